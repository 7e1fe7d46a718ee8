"""Wide residual networks, pre-activation: Zagoruyko & Komodakis, BMVC 2016, arXiv:1605.07146.

Depth 6n+4, width factor k, no dropout, as in RepDistiller.  The maps are the signed outputs of the groups; the first
batch norm of the next group (after the last group: the final one) belongs to the stage before it, because what it
gives is that stage's pre-activation, computed once.  Deviation: the pool adapts to any input size.
"""

import math
import re

from torch import Tensor, nn

from pupil.net import Net, Stage


class PreActBlock(nn.Module):
    """BN, ReLU, 3x3, BN, ReLU, 3x3 and a shortcut; `entry` is False where the stage before has done BN and ReLU."""

    def __init__(self, c_in: int, c_out: int, stride: int, entry: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in) if entry else None
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.shortcut = None if c_in == c_out else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a = x if self.bn1 is None else self.relu(self.bn1(x))
        h = self.conv2(self.relu(self.bn2(self.conv1(a))))
        return h + (x if self.shortcut is None else self.shortcut(a))


def wrn(n: int, k: int, num_classes: int) -> Net:
    """A WRN of depth 6n+4 and width factor k."""
    widths = (16, 16 * k, 32 * k, 64 * k)
    stages = [
        Stage(
            *(PreActBlock(c_in if i == 0 else c_out, c_out, stride if i == 0 else 1, entry=g == 0 or i > 0) for i in range(n)),
            norm=nn.BatchNorm2d(c_out),
            act=nn.ReLU(),
        )
        for g, (c_in, c_out, stride) in enumerate(zip(widths, widths[1:], (1, 2, 2), strict=False))
    ]
    net = Net(nn.Conv2d(3, 16, 3, 1, 1, bias=False), stages, nn.Linear(widths[-1], num_classes))
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, 0, math.sqrt(2 / (m.kernel_size[0] * m.kernel_size[1] * m.out_channels)))
    nn.init.zeros_(net.head.bias)  # type: ignore[arg-type]
    return net


def published_key(key: str) -> str:
    """The key of a tensor in the authors' checkpoints -> ours."""
    key = re.sub(r"^conv1\.", "stem.", key)
    key = re.sub(r"^block([23])\.layer\.0\.bn1\.", lambda m: f"stages.{int(m[1]) - 2}.norm.", key)
    key = re.sub(r"^bn1\.", "stages.2.norm.", key)
    key = re.sub(r"^block(\d)\.layer\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.", key)
    key = key.replace("convShortcut.", "shortcut.")
    return re.sub(r"^fc\.", "head.", key)


def wrn_16_1(num_classes: int) -> Net:
    return wrn(2, 1, num_classes)


def wrn_16_2(num_classes: int) -> Net:
    return wrn(2, 2, num_classes)


def wrn_40_1(num_classes: int) -> Net:
    return wrn(6, 1, num_classes)


def wrn_40_2(num_classes: int) -> Net:
    return wrn(6, 2, num_classes)


def wrn_28_10(num_classes: int) -> Net:
    return wrn(4, 10, num_classes)
