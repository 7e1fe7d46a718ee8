"""FT: compress the teacher's last map to a factor, and train the student to produce one with the same spatial pattern.

Paper: Kim, Park & Kwak, NeurIPS 2018, arXiv:1802.04977.
Loss: phase "init": mean (dec(enc(f_t)) - f_t)^2.  Phase "distil": ce * CE + kl * KL(T) + beta * mean |F(translate(f_s)) -
F(enc(f_t))|^p2, where F is the mean over channels of x^p1 at every position, scaled to unit norm; of two factors the
larger is average-pooled to the smaller first.
Trained: in "init" the paraphraser (enc and dec, three 3x3 convolutions each), in "distil" the student and the translator
(three 3x3 convolutions with batch norm).  Deployed: the student.
Defaults: RepDistiller's (beta 200, p1 2, p2 1, a factor of half the teacher's channels, 30 epochs of "init" at a
learning rate that stays).  Presets: spot-adaptive with kl 1; for vgg students init_lr is the optimiser's 0.05.
Deviations: none.  init_lr is 0.01 as the authors have it for students called resnet or wrn; for others they take the
optimiser's: that is init_lr 0 here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pupil.methods.base import Group, Method, Phase, Setup, needs_maps
from pupil.methods.functions import same_size
from pupil.types import Batch, Features, Term, Terms, UserError

SLOPE = 0.1


class FT(Method):
    paper = "Kim, Park & Kwak, NeurIPS 2018, arXiv:1802.04977"
    needs_same_classes = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "repdistiller": {},
        "vgg13-vgg8": {"init_lr": 0.0},
        "spot-adaptive": {"kl": 1.0},
        "ResNet50-vgg8": {"kl": 1.0, "init_lr": 0.0},
    }

    @dataclass(frozen=True)
    class Config(Method.Config):
        beta: float = 200.0
        k: float = 0.5  # channels of the factor, as a share of the teacher's
        p1: int = 2  # exponent of the channels whose mean is a factor's pattern
        p2: int = 1  # exponent of the difference
        init_epochs: int = 30  # of the first phase
        init_lr: float = 0.01  # 0: the optimiser's

    spots = (-2,)  # the last map

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        needs_maps("ft", setup)
        c_s, c_t = setup.s.maps[-1].shape[1], setup.t.maps[-1].shape[1]
        c = int(c_t * hp.k)
        if c < 1 or hp.k > 1:
            raise UserError(f"ft: hp.ft.k must be a share of the teacher's {c_t} channels, at most 1, got {hp.k}")
        if min(hp.p1, hp.p2, hp.init_epochs) < 1:
            values = f"{hp.p1}, {hp.p2} and {hp.init_epochs}"
            raise UserError(f"ft: hp.ft.p1, p2 and init_epochs must be at least 1, got {values}")
        if hp.init_lr < 0:
            raise UserError(f"ft: hp.ft.init_lr must be positive, or 0 for the optimiser's, got {hp.init_lr}")
        self.translate = nn.Sequential(*layers((c_s, c_s, c, c), norm=True))
        self.paraphraser = nn.ModuleDict(
            {
                "encode": nn.Sequential(*layers((c_t, c_t, c, c))),
                "decode": nn.Sequential(*layers((c, c, c_t, c_t), nn.ConvTranspose2d)),
            }
        )

    def phases(self) -> list[Phase]:
        hp = self.hp
        init = Phase("init", self.warm_up, [Group(self.paraphraser)], hp.init_epochs, hp.init_lr or None, constant=True)
        return [init, Phase("distil", self.loss, [Group(self.student), Group(self.translate)])]

    def warm_up(self, s: Features, t: Features, batch: Batch) -> Terms:
        f_t = t.taps[self.spots[0]]
        again = self.paraphraser["decode"](self.paraphraser["encode"](f_t))
        return {"reconstruction": Term(F.mse_loss(again.float(), f_t.float()), 1.0)}

    def compared(self, s: Features, t: Features) -> list[tuple[Tensor, Tensor]]:
        (spot,) = self.spots
        with torch.set_grad_enabled(t.taps[spot].requires_grad):
            theirs = self.paraphraser["encode"](t.taps[spot])
        return [(self.translate(s.taps[spot]), theirs)]

    def match(self, i: int, f_s: Tensor, f_t: Tensor, batch: Batch) -> Tensor:
        """`f_s` and `f_t`: the factors."""
        a, b = same_size(f_s.float(), f_t.float())
        p = self.hp.p1
        return (pattern(a, p) - pattern(b, p)).abs().pow(self.hp.p2).mean()


def pattern(factor: Tensor, p: int) -> Tensor:
    """(B, C, H, W) -> (B, HW), unit norm."""
    return F.normalize(factor.pow(p).mean(1).flatten(1))


def layers(widths: tuple[int, ...], conv: type[nn.Module] = nn.Conv2d, norm: bool = False) -> list[nn.Module]:
    """3x3 convolutions of stride 1 from width to width, each with a leaky ReLU after it."""
    found: list[nn.Module] = []
    for a, b in pairwise(widths):
        found += [conv(a, b, 3, 1, 1), *([nn.BatchNorm2d(b)] if norm else []), nn.LeakyReLU(SLOPE)]
    return found
