"""The wide residual networks of CSKD and REFILLED: pre-activation, with a bias in every convolution and dropout.

CSKD: Wang, Rhodes & Feng, ACCV 2022; REFILLED: Ye, Lu & Zhan, CVPR 2020.  They differ from `wrn` also in that the
second convolution of a block carries the stride, the shortcut takes the signed map and the final batch norm has
momentum 0.9; from each other in the place of the dropout.  Initialisation: torch's own.  Deviations: the pool adapts
to any input size, and the maps before a ReLU, which the authors' code cannot give, are those of `wrn`.
"""

from functools import partial

from torch import Tensor, nn

from pupil.models.wrn import assembled
from pupil.models.wrn import published_key as published_key
from pupil.net import Net, Stage

Pair = tuple[Tensor, Tensor]  # a signed map; act(norm(map))


class BiasedBlock(nn.Module):
    """BN, ReLU, 3x3, BN, ReLU, 3x3 and a shortcut; `entry` is False where the stage before has done BN and ReLU."""

    def __init__(
        self, c_in: int, c_out: int, stride: int, entry: bool, drop_before_norm: float, drop_after_relu: float
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in) if entry else None
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, 1, 1)
        self.drop1 = nn.Dropout(drop_before_norm)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.drop2 = nn.Dropout(drop_after_relu)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, stride, 1)
        self.shortcut = None if stride == 1 and c_in == c_out else nn.Conv2d(c_in, c_out, 1, stride)

    def forward(self, x: Tensor | Pair) -> Tensor:
        if isinstance(x, Tensor):
            assert self.bn1 is not None
            raw, a = x, self.relu(self.bn1(x))
        else:
            raw, a = x
        h = self.conv2(self.drop2(self.relu(self.bn2(self.drop1(self.conv1(a))))))
        return h + (raw if self.shortcut is None else self.shortcut(raw))


class PairStage(Stage):
    """What goes on is the map and act(norm(map)): the next stage needs both."""

    def forward(self, x: Tensor | Pair) -> tuple[Tensor, Tensor, Pair]:  # type: ignore[override]
        raw = self.blocks(x)
        assert self.norm is not None
        pre = self.norm(raw)
        return pre, raw, (raw, self.act(pre))

    def onward(self, x: Tensor) -> Pair:  # type: ignore[override]
        return x, super().onward(x)


def wrn_biased(n: int, k: int, num_classes: int, drop_before_norm: float = 0.0, drop_after_relu: float = 0.0) -> Net:
    """A WRN of depth 6n+4 and width factor k; dropout is by element, after `conv1` or after the ReLU of `bn2`."""
    block = partial(BiasedBlock, drop_before_norm=drop_before_norm, drop_after_relu=drop_after_relu)
    return assembled(n, k, num_classes, block, bias=True, kind=PairStage, momentum=0.9)


def cskd_wrn_16_1(num_classes: int) -> Net:
    return wrn_biased(2, 1, num_classes, drop_before_norm=0.05)


def cskd_wrn_40_2(num_classes: int) -> Net:
    return wrn_biased(6, 2, num_classes, drop_before_norm=0.05)


def refilled_wrn_16_1(num_classes: int) -> Net:
    return wrn_biased(2, 1, num_classes, drop_after_relu=0.3)


def refilled_wrn_16_2(num_classes: int) -> Net:
    return wrn_biased(2, 2, num_classes, drop_after_relu=0.3)


def refilled_wrn_40_1(num_classes: int) -> Net:
    return wrn_biased(6, 1, num_classes, drop_after_relu=0.3)


def refilled_wrn_40_2(num_classes: int) -> Net:
    return wrn_biased(6, 2, num_classes, drop_after_relu=0.3)
