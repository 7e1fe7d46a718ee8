"""SimKD: keep the teacher's classifier and train the student's encoder and a projector with one L2 loss.

Paper: Chen et al., CVPR 2022, arXiv:2203.14001.
Loss: beta * mean (P(f_s) - f_t)^2 over every element of the last maps; the larger map is average-pooled to the smaller.
Trained: the student without its classifier, and P (1x1, 3x3 and 1x1 convolutions without bias, each with batch norm
and ReLU; the middle width is the teacher's divided by `factor`).
Deployed: encoder + projector + the teacher's frozen classifier.
Defaults: the authors' (ce 0, kl 0, beta 1, factor 2).
Deviations: the student's own classifier, which the authors carry along untrained, does not exist; ce and kl, if
given, act on what is deployed (the authors': on the student's own logits); pre-activation students are projected
after their last BN and ReLU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from pupil.methods.base import Method, Setup, needs_maps
from pupil.methods.functions import same_size
from pupil.net import FrozenLinear, Net
from pupil.types import Batch, Features, UserError


class SimKD(Method):
    paper = "Chen et al., CVPR 2022, arXiv:2203.14001"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"simkd": {}}

    @dataclass(frozen=True)
    class Config(Method.Config):
        ce: float = 0.0
        beta: float = 1.0
        factor: int = 2  # the teacher's channels over those in the middle of the projector

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        self.student.head.load_state_dict(FrozenLinear.of(setup.teacher.head).state_dict())

    @classmethod
    def plan(cls, setup: Setup, hp: Config) -> dict[str, Any]:
        needs_maps("simkd", setup)
        if not setup.teacher.pools_last:
            raise UserError(
                f"simkd gives the student the teacher's classifier, which must see the mean of its last map; that of"
                f" {setup.teacher.name} has layers in between; use kd, fitnet or crd, or another teacher"
            )
        ours, theirs = setup.s.maps[-1], setup.t.last
        width = theirs.shape[1]
        if not 1 <= hp.factor <= width:
            raise UserError(f"simkd: hp.simkd.factor must be from 1 to the teacher's {width} channels, got {hp.factor}")
        side = theirs.shape[2] if ours.shape[2] > theirs.shape[2] else None
        return {"c_in": ours.shape[1], "c_out": width, "factor": hp.factor, "side": side, "classes": setup.t.logits.shape[1]}

    @staticmethod
    def deployed(net: Net, c_in: int, c_out: int, factor: int, side: int | None, classes: int) -> Net:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`side`: the student's map is pooled to that many pixels; None: left as it is."""
        fit = [] if side is None else [nn.AdaptiveAvgPool2d(side)]
        layers = [*fit, *projector(c_in, c_out, factor)]
        if net.name:  # what goes on after its last stage need not be a map
            layers.insert(0, net.stages[-1].view)  # type: ignore[union-attr]
        made = Net(net.stem, list(net.stages), FrozenLinear(c_out, classes), nn.Sequential(*layers))  # type: ignore[arg-type]
        made.name = net.name
        return made

    def knowledge(self, s: Features, t: Features, batch: Batch) -> Tensor:
        return F.mse_loss(*same_size(s.last.float(), t.last.float()))


def projector(c_in: int, c_out: int, factor: int) -> list[nn.Module]:
    """(B, c_in, H, W) -> (B, c_out, H, W), not negative."""
    mid = c_out // factor
    layers: list[nn.Module] = []
    for a, b, k in ((c_in, mid, 1), (mid, mid, 3), (mid, c_out, 1)):
        layers += [nn.Conv2d(a, b, k, padding=k // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return layers
