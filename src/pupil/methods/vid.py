"""VID: raise a lower bound of the mutual information between the maps of teacher and student.

Paper: Ahn et al., CVPR 2019, arXiv:1904.05835.
Loss: ce * CE + kl * KL(T) + beta * sum over stages of mean 1/2 [ (m(f_s) - f_t)^2 / v_c + ln v_c ] over every element:
a Gaussian of mean m(f_s) and of one variance per teacher channel, v_c = ln(1 + exp(a_c)) + 1e-5; of two maps the larger
is average-pooled to the smaller first.  It can fall below 0.
Trained: the student and, per stage, the regressor m (three 1x1 convolutions without bias, ReLU in between) and a.
Deployed: the student.
Defaults: RepDistiller's (ce 1, kl 0, beta 1, v = 5 at the start).  Presets: simkd and spot-adaptive with kl 1; ctkd with
ce 0.1 and kl 0.9; mdistiller the same.
Deviations: none from RepDistiller.  mdistiller leaves the variances at 5 by mistake; here they are trained.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pupil.methods.base import Method, Setup, paired_maps, paired_spots
from pupil.methods.functions import same_size
from pupil.types import Batch, UserError

EPS = 1e-5  # the smallest variance


class VID(Method):
    paper = "Ahn et al., CVPR 2019, arXiv:1904.05835"
    needs_same_classes = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "repdistiller": {},
        "simkd": {"kl": 1.0},
        "spot-adaptive": {"kl": 1.0},
        "mdistiller": {},
        "ctkd": {"ce": 0.1, "kl": 0.9},
    }

    @dataclass(frozen=True)
    class Config(Method.Config):
        beta: float = 1.0
        variance: float = 5.0  # at the start, of every channel

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        if hp.variance <= EPS:
            raise UserError(f"vid: hp.vid.variance must be greater than {EPS:g}, got {hp.variance}; the authors' is 5")
        self.spots = paired_spots("vid", setup)
        widths = [(f_s.shape[1], f_t.shape[1]) for f_s, f_t in paired_maps(setup.s, setup.t)]
        start = math.log(math.expm1(hp.variance - EPS))
        self.regress = nn.ModuleList(mean_of_teacher(c_s, c_t) for c_s, c_t in widths)
        self.log_scale = nn.ParameterList(torch.full((c_t,), start) for _, c_t in widths)

    def match(self, i: int, f_s: Tensor, f_t: Tensor, batch: Batch) -> Tensor:
        f_s, f_t = same_size(f_s, f_t)
        v = self.variances(i)[:, None, None]
        return 0.5 * ((self.regress[i](f_s).float() - f_t.float()).square() / v + v.log()).mean()

    def variances(self, i: int) -> Tensor:
        """(C_t,) of the stage at spot i."""
        return F.softplus(self.log_scale[i].float()) + EPS

    def observed(self) -> dict[str, Tensor]:
        """The mean variance of each stage: how little of it the student can tell."""
        return {f"variance_{spot}": self.variances(i).detach().mean() for i, spot in enumerate(self.spots)}


def mean_of_teacher(c_s: int, c_t: int) -> nn.Sequential:
    """(B, c_s, H, W) -> (B, c_t, H, W)."""
    first, second, third = (nn.Conv2d(c, c_t, 1, bias=False) for c in (c_s, c_t, c_t))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
