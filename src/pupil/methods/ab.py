"""AB: first teach the student on which side of zero the teacher's neurons are, then train it on labels.

Paper: Heo et al., AAAI 2019, arXiv:1811.03233.
Loss: phase "init": beta * sum over the n stages of 2^(i - n) * 3 / (1000 B) * sum of relu(m + s)^2 where t <= 0 and of
relu(m - s)^2 where t > 0, with s = c_i(student) and t the maps before their ReLU, i from 1 and m the margin.
Phase "distil": ce * CE + kl * KL(T).
Trained: in "init" the stem and the stages, up to the last map, and the connectors c_i (convolution and batch norm;
none where the shapes agree); in "distil" the student.  Deployed: the student.
Defaults: RepDistiller's (margin 1, 30 epochs of "init" at a learning rate that stays, then ce 1, kl 0).
Deviations: beta weighs the first phase (theirs has no effect; 1 is the same).  As theirs: in "init" the rest of the
student (classifier, neck, the last norm of pre-activation networks) is in eval mode and keeps its weights.  Where a
student's map is smaller than the teacher's, and not by half, the teacher's is average-pooled (theirs stops).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pupil.methods.adapters import regressor
from pupil.methods.base import Group, Method, Phase, Setup, encoder, needs_maps
from pupil.methods.functions import same_size
from pupil.types import Batch, Features, Term, Terms, UserError


class AB(Method):
    paper = "Heo et al., AAAI 2019, arXiv:1811.03233"
    needs_same_classes = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"repdistiller": {}}

    @dataclass(frozen=True)
    class Config(Method.Config):
        beta: float = 1.0
        margin: float = 1.0  # how far from zero the student must be on the right side
        init_epochs: int = 30  # of the first phase

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        needs_maps("ab", setup)
        shapes = [[f.shape for f in features.pre] for features in (setup.s, setup.t)]
        if len(shapes[0]) != len(shapes[1]):
            raise UserError(
                f"ab: student and teacher must have equally many maps, got {len(shapes[0])} and {len(shapes[1])};"
                " use fitnet, semckd or reviewkd"
            )
        if hp.init_epochs < 1 or not hp.beta:
            raise UserError(f"ab: hp.ab.init_epochs and beta must be positive, got {hp.init_epochs} and {hp.beta}")
        if not (hp.ce or hp.kl):
            raise UserError("ab: hp.ab.ce and kl are both 0, so there is nothing to train on after the first phase")
        self.connectors = nn.ModuleList(
            nn.Identity() if s[1:] == t[1:] else regressor(s, t, relu=False) for s, t in zip(*shapes, strict=True)
        )

    def phases(self) -> list[Phase]:
        trained = Group(nn.ModuleList([*self.connectors, encoder(self.student)]))
        init = Phase("init", self.warm_up, [trained], self.hp.init_epochs, constant=True)
        return [init, Phase("distil", self.loss, [Group(self.student)])]

    def warm_up(self, s: Features, t: Features, batch: Batch) -> Terms:
        return {"boundaries": Term(self.knowledge(s, t, batch), self.hp.beta)}

    def loss(self, s: Features, t: Features, batch: Batch) -> Terms:
        return self.usual(s, t, batch)

    def knowledge(self, s: Features, t: Features, batch: Batch) -> Tensor:
        connected = [connector(f) for connector, f in zip(self.connectors, s.pre, strict=True)]
        return torch.stack([self.match(i, *pair, batch) for i, pair in enumerate(zip(connected, t.pre, strict=True))]).sum()

    def match(self, i: int, f_s: Tensor, f_t: Tensor, batch: Batch) -> Tensor:
        """`f_s`: after its connector."""
        f_s, f_t = same_size(f_s.float(), f_t.float())
        wrong = torch.relu(self.hp.margin + torch.where(f_t > 0, -f_s, f_s))
        return 2.0 ** (i + 1 - len(self.connectors)) * 3 / 1000 * wrong.square().sum() / len(f_s)
