"""AT: attend where the teacher attends, at every stage.

Paper: Zagoruyko & Komodakis, ICLR 2017, arXiv:1612.03928.
Loss: ce * CE + kl * KL(T) + beta * sum over stages of mean (Q(f_s) - Q(f_t))^2 over samples and positions, with
Q(f) = the mean of f^p over channels, flattened and scaled to unit norm; of two maps the larger is average-pooled to the
smaller before the power.
Trained: the student.  Deployed: the student.
Defaults: RepDistiller's (ce 1, kl 0, beta 1000, p 2).  Presets: simkd and spot-adaptive with kl 1; mdistiller the same.
Deviations: none.  beta belongs to the mean over positions: the paper's sum over them is H W times as large.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pupil.methods.base import Method, Setup, paired_spots
from pupil.methods.functions import same_size
from pupil.types import Batch, UserError


class AT(Method):
    paper = "Zagoruyko & Komodakis, ICLR 2017, arXiv:1612.03928"
    remembers = ("shown",)
    needs_same_classes = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "repdistiller": {},
        "simkd": {"kl": 1.0},
        "spot-adaptive": {"kl": 1.0},
        "mdistiller": {},
    }

    @dataclass(frozen=True)
    class Config(Method.Config):
        beta: float = 1000.0
        p: int = 2  # the power that turns a map into attention

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        if hp.p < 1:
            raise UserError(f"at: hp.at.p must be 1 or more, got {hp.p}; the paper's is 2")
        self.spots = paired_spots("at", setup)
        self.shown: dict[str, Tensor] = {}

    def match(self, i: int, f_s: Tensor, f_t: Tensor, batch: Batch) -> Tensor:
        f_s, f_t = same_size(f_s.float(), f_t.float())
        q_s, q_t = attention(f_s, self.hp.p), attention(f_t, self.hp.p)
        both = torch.stack([q_s[0], q_t[0]]).detach()
        self.shown[f"attention_{self.spots[i]}"] = both.unflatten(1, f_s.shape[2:]).transpose(0, 1).flatten(1)
        return F.mse_loss(q_s, q_t)

    def observed(self) -> dict[str, Tensor]:
        """Of the last batch's first image: the student's attention and, to its right, the teacher's."""
        return self.shown


def attention(f: Tensor, p: int) -> Tensor:
    """(B, C, H, W) -> (B, H W), unit norm."""
    return F.normalize(f.pow(p).mean(1).flatten(1))
