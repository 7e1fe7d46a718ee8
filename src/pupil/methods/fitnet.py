"""FitNet: regress the student's map at one depth onto the teacher's.

Paper: Romero et al., ICLR 2015, arXiv:1412.6550.
Loss: ce * CE + kl * KL(T) + beta * mean (r(f_s) - f_t)^2, over every element.
Trained: the student and the regressor r (convolution, batch norm, ReLU).  Deployed: the student.
Defaults: beta 100 at spot 2, RepDistiller's and mdistiller's.  Presets: simkd with kl 1 and spot 1; spot-adaptive with
kl 1 and beta 1.
As in all those suites there is no hint-only stage: both terms are trained from the first epoch, unlike the paper.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from pupil.methods.adapters import regressor
from pupil.methods.base import Method, Setup, needs_maps
from pupil.methods.functions import same_size
from pupil.types import Batch, Features, UserError


class FitNet(Method):
    needs_same_classes = False
    paper = "Romero et al., ICLR 2015, arXiv:1412.6550"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "repdistiller": {},
        "simkd": {"kl": 1.0, "hint": 1},
        "spot-adaptive": {"kl": 1.0, "beta": 1.0},
        "mdistiller": {},
    }

    @dataclass(frozen=True)
    class Config(Method.Config):
        beta: float = 100.0
        hint: int = 2  # 0: the stem; 1 and up: the stages

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        needs_maps("fitnet", setup)
        deepest = min(len(setup.s.maps), len(setup.t.maps))
        if not 0 <= hp.hint <= deepest:
            raise UserError(f"fitnet: hp.fitnet.hint must be from 0 (stem) to {deepest} (last common stage), got {hp.hint}")
        self.spots = (hp.hint,)
        self.regress = regressor(setup.s.taps[hp.hint].shape, setup.t.taps[hp.hint].shape)

    def compared(self, s: Features, t: Features) -> list[tuple[Tensor, Tensor]]:
        (spot,) = self.spots
        return [(self.regress(s.taps[spot]), t.taps[spot])]

    def match(self, i: int, f_s: Tensor, f_t: Tensor, batch: Batch) -> Tensor:
        """`f_s`: after the regressor."""
        return F.mse_loss(*same_size(f_s.float(), f_t.float()))
