"""OFD: regress the teacher's maps before their ReLU, except where both are so negative that the ReLU hides it.

Paper: Heo et al., ICCV 2019, arXiv:1904.01866.
Loss: ce * CE + kl * KL(T) + beta * sum over the n stages of 2^(i - n) * 1/B sum d^2, where d = c_i(f_s) - max(f_t, M), and
only the positive part of d counts where f_t <= 0.  M, one number for each channel, is the mean of the teacher's negative
values as its batch norm has them: m - s phi(m/s) / Phi(-m/s) with shift m and scale s, or -3 s where Phi(-m/s) <= 0.001.
The teacher's map is average-pooled to the student's size.
Trained: the student and the connectors c_i (convolution without bias, batch norm).  Deployed: the student.
Defaults: mdistiller's (ce 1, beta 0.001, 1x1 connectors).  Presets: imagenet with beta 0.0001.
Deviations: the teacher is in eval mode; `teacher_mode: train` puts a private copy of it in train mode, whose batch norms
work by the batch and whose running statistics drift, as in mdistiller (one more forward pass a step).  Where the numbers
of stages differ, the deepest ones are paired, and so are their margins (mdistiller's margins are then of other stages).
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pupil.methods.base import Group, Method, Phase, Setup, needs_maps
from pupil.net import Net, Stage
from pupil.types import Batch, Features, UserError


class OFD(Method):
    paper = "Heo et al., ICCV 2019, arXiv:1904.01866"
    needs_same_classes = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"mdistiller": {}, "imagenet": {"beta": 1e-4}}

    @dataclass(frozen=True)
    class Config(Method.Config):
        beta: float = 1e-3
        kernel: int = 1  # side of the connectors
        teacher_mode: str = "eval"  # eval | train

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        needs_maps("ofd", setup)
        if hp.kernel < 1 or hp.kernel % 2 == 0:
            raise UserError(f"ofd: hp.ofd.kernel must be odd and positive, got {hp.kernel}")
        if hp.teacher_mode not in ("eval", "train"):
            raise UserError(f"ofd: hp.ofd.teacher_mode must be eval or train, got {hp.teacher_mode!r}")
        n = min(len(setup.s.pre), len(setup.t.pre))
        widths = zip(setup.s.pre[-n:], setup.t.pre[-n:], strict=True)
        self.connectors = nn.ModuleList(connector(a.shape[1], b.shape[1], hp.kernel) for a, b in widths)
        for i, norm in enumerate(norms(setup)[-n:]):
            self.register_buffer(f"margin_{i}", margin(norm))
        self.twin = InTrainMode(setup.teacher) if hp.teacher_mode == "train" else None

    def phases(self) -> list[Phase]:
        return [Phase("distil", self.loss, [Group(self.student), Group(self.connectors)])]

    def knowledge(self, s: Features, t: Features, batch: Batch) -> Tensor:
        theirs, n = t.pre if self.twin is None else self.twin(batch.images), len(self.connectors)
        pairs = zip(s.pre[-n:], theirs[-n:], strict=True)
        return torch.stack([self.match(i, f_s, f_t, batch) for i, (f_s, f_t) in enumerate(pairs)]).sum()

    def match(self, i: int, f_s: Tensor, f_t: Tensor, batch: Batch) -> Tensor:
        a, n = self.connectors[i](f_s).float(), len(self.connectors)
        b = F.adaptive_avg_pool2d(f_t.float(), (a.shape[2], a.shape[3]))
        d = a - torch.maximum(b, self.get_buffer(f"margin_{i}")[:, None, None])
        return 2.0 ** (i + 1 - n) * torch.where(b > 0, d, d.relu()).square().sum() / len(a)


class InTrainMode(nn.Module):
    """A private copy of a network, always in train mode and without gradients: (B, 3, H, W) -> its maps before ReLU."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = copy.deepcopy(net).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "InTrainMode":
        return super().train(True)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.net.features(images).pre


def connector(c_in: int, c_out: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
    nn.init.normal_(conv.weight, 0, math.sqrt(2 / (kernel**2 * c_out)))
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


def margin(norm: nn.BatchNorm2d) -> Tensor:
    """(C,) float32, negative: the mean of the negative part of N(shift, scale^2)."""
    m, s = norm.bias.detach().double(), norm.weight.detach().double().abs().clamp_min(1e-12)
    below = torch.special.ndtr(-m / s)
    density = torch.exp(-((m / s) ** 2) / 2) / math.sqrt(2 * math.pi)
    return torch.where(below > 0.001, m - s * density / below, -3 * s).float()


def norms(setup: Setup) -> list[nn.BatchNorm2d]:
    """The batch norm before each of the teacher's ReLUs that end a stage; refuses a teacher without."""
    pairs = zip(setup.teacher.stages, setup.t.pre, strict=True)
    found = [norm_of(stage, f.shape[1]) for stage, f in pairs]  # type: ignore[arg-type]
    some = [norm for norm in found if norm is not None]
    if setup.teacher.name or len(some) < len(found):
        raise UserError(
            f"ofd needs a teacher with a batch norm before the end of every stage, and {setup.teacher.name or 'this one'} has"
            " none that can be told; take a resnet, wrn, vgg or MobileNetV2 as teacher, or use reviewkd, ab or semckd"
        )
    return some


def norm_of(stage: Stage, width: int) -> nn.BatchNorm2d | None:
    """Of a stage with its own norm that; else the last of the last block, shortcuts aside, if it is as wide as the map."""
    if isinstance(stage.norm, nn.BatchNorm2d):
        return stage.norm
    named = stage.blocks[-1].named_modules()
    inside = [m for name, m in named if isinstance(m, nn.BatchNorm2d) and "downsample" not in name.split(".")]
    return inside[-1] if inside and inside[-1].num_features == width else None
