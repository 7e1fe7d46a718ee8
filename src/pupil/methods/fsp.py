"""FSP: first teach the student how the channels of one map go with those of the next, then train it on labels.

Paper: Yim et al., CVPR 2017, doi:10.1109/CVPR.2017.754.
Loss: phase "init": beta * sum over consecutive maps (f_i, f_i+1), the stem first, of mean (G_i^s - G_i^t)^2 with
G_i[p, q] = mean over positions of f_i+1[p] * f_i[q]; the larger of the two is average-pooled to the smaller first.
Phase "distil": ce * CE + kl * KL(T).
Trained: in "init" the stem and the stages, up to the last map; in "distil" the student.  Deployed: the student.
Defaults: RepDistiller's (30 epochs of "init" at a learning rate that stays, then ce 1, kl 0).
Deviations: beta weighs the first phase; theirs, 50, has no effect, and 1 is the same.  As theirs, what is not trained in
"init" is in eval mode there.  Student and teacher must have equally many maps of equally many channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pupil.methods.base import Group, Method, Phase, Setup, encoder, needs_maps
from pupil.methods.functions import product, same_size
from pupil.types import Batch, Features, Term, Terms, UserError


class FSP(Method):
    paper = "Yim et al., CVPR 2017, doi:10.1109/CVPR.2017.754"
    needs_same_classes = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"repdistiller": {}}

    @dataclass(frozen=True)
    class Config(Method.Config):
        beta: float = 1.0
        init_epochs: int = 30  # of the first phase

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        needs_maps("fsp", setup)
        widths = [[f.shape[1] for f in features.taps[:-1]] for features in (setup.s, setup.t)]
        if widths[0] != widths[1]:
            raise UserError(
                f"fsp: stem and maps of student and teacher must have equally many channels, got {widths[0]} and {widths[1]};"
                " use semckd or reviewkd"
            )
        if hp.init_epochs < 1 or not hp.beta:
            raise UserError(f"fsp: hp.fsp.init_epochs and beta must be positive, got {hp.init_epochs} and {hp.beta}")
        if not (hp.ce or hp.kl):
            raise UserError("fsp: hp.fsp.ce and kl are both 0, so there is nothing to train on after the first phase")

    def phases(self) -> list[Phase]:
        init = Phase("init", self.warm_up, [Group(encoder(self.student))], self.hp.init_epochs, constant=True)
        return [init, Phase("distil", self.loss, [Group(self.student)])]

    def warm_up(self, s: Features, t: Features, batch: Batch) -> Terms:
        return {"flow": Term(self.knowledge(s, t, batch), self.hp.beta)}

    def loss(self, s: Features, t: Features, batch: Batch) -> Terms:
        return self.usual(s, t, batch)

    def knowledge(self, s: Features, t: Features, batch: Batch) -> Tensor:
        flows = zip(pairwise(s.taps[:-1]), pairwise(t.taps[:-1]), strict=True)
        return torch.stack([F.mse_loss(flow(*ours), flow(*theirs)) for ours, theirs in flows]).sum()


def flow(a: Tensor, b: Tensor) -> Tensor:
    """Two maps (B, C, H, W) and (B, D, H', W') -> (B, D, C): which channels fire together, mean over positions."""
    a, b = same_size(a.float(), b.float())
    return product(b.flatten(2), a.flatten(2).mT) / a[0, 0].numel()
