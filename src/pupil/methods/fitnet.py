"""FitNet: regress the student's map at one depth onto the teacher's.

Paper: Romero et al., ICLR 2015, arXiv:1412.6550.
Loss: ce * CE + kl * KL(T) + beta * mean (r(f_s) - f_t)^2, over every element.
Trained: the student and the regressor r (convolution, batch norm, ReLU).  Deployed: the student.
Defaults: beta 100 at spot 2, RepDistiller's and mdistiller's (SimKD: hint 1 with ce = kl = 1; spot-adaptive: beta 1).
As in all those suites there is no hint-only stage: both terms are trained from the first epoch, unlike the paper.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from pupil.methods.adapters import regressor
from pupil.methods.base import Method, Setup, needs_maps, same_size
from pupil.types import Batch, UserError


class FitNet(Method):
    paper = "Romero et al., ICLR 2015, arXiv:1412.6550"

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

    def match(self, i: int, f_s: Tensor, f_t: Tensor, batch: Batch) -> Tensor:
        return F.mse_loss(*same_size(self.regress(f_s).float(), f_t.float()))
