"""CTKD: learn the temperature against the student, from easy to hard.

Paper: Li et al., AAAI 2023, arXiv:2211.16231.
Loss: the wrapped method's (`of`) at temperature T = 1 + 20 sigmoid(g), with ce and beta as factors of its weights; the
gradient of the loss with respect to g is multiplied by lambda, which falls as a cosine from 0 to -1 over `ramp` epochs
and stays there, so that g climbs while the student descends.
Trained: the student, g (from 1, so T from 15.62) and what the wrapped method trains.  Deployed: the student.
Defaults: the authors' for KD (0.1 CE + 0.9 KL).  Another method is taken with its preset `ctkd` if it has one (0.1 CE +
0.9 KL + its own term; DKD: 1 CE, beta 2), and must have a term at a temperature.
Deviations: none; the authors' released code has the one global temperature too.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pupil.methods.base import Loss, Method, Setup
from pupil.methods.wrapping import Wrapper, weighed, wrap
from pupil.types import Batch, Features, Terms, UserError


class CTKD(Method):
    paper = "Li et al., AAAI 2023, arXiv:2211.16231"

    @dataclass(frozen=True)
    class Config(Wrapper):
        T: float = 4.0  # not used: it is learned
        T_min: float = 1.0  # least temperature
        T_span: float = 20.0  # how far above it the temperature may go
        ramp: int = 10  # epochs until the temperature is trained with its full gradient

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        if hp.T_min <= 0 or hp.T_span <= 0 or hp.ramp < 1:
            raise UserError(
                f"ctkd: hp.ctkd.T_min, T_span and ramp must be greater than 0, got {hp.T_min}, {hp.T_span} and {hp.ramp}"
            )
        self.inner = wrap("ctkd", setup, hp)
        self.g = nn.Parameter(torch.ones(()))
        self.two_views = self.inner.two_views

    def temperature(self, epoch: int) -> Tensor:
        """A scalar whose gradient reaches g turned round."""
        pull = reversal(epoch, self.hp.ramp)
        g = pull * self.g + (1 - pull) * self.g.detach()
        return self.hp.T_min + self.hp.T_span * torch.sigmoid(g.float())

    def loss(self, s: Features, t: Features, batch: Batch) -> Terms:
        self.inner.hp = replace(self.inner.hp, T=self.temperature(batch.epoch))
        return weighed(self.inner.loss(s, t, batch), self.hp)

    def forward(self, batch: Batch, t: Features, loss: Loss) -> Terms:
        return self.inner(batch, t, loss)  # which may want another view

    def observed(self) -> dict[str, Tensor]:
        return {"temperature": self.temperature(1).detach(), **self.inner.observed()}


def reversal(epoch: int, ramp: int) -> float:
    """What the gradient of the temperature is multiplied by; epochs count from 1."""
    return (math.cos(math.pi * min(epoch, ramp) / ramp) + 1) / 2 - 1
