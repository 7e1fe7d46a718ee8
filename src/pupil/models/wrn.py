"""Wide residual networks, pre-activation: Zagoruyko & Komodakis, BMVC 2016, arXiv:1605.07146.

Depth 6n+4, width factor k, no dropout, as in RepDistiller.  The maps are the signed outputs of the groups; the first
batch norm of the next group (after the last group: the final one) belongs to the stage before it, because what it
gives is that stage's pre-activation, computed once.  Deviation: the pool adapts to any input size.
"""

import math
import re
from collections.abc import Callable

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


Block = Callable[..., nn.Module]  # of c_in, c_out, stride, entry


def assembled(
    n: int, k: int, num_classes: int, block: Block, *, bias: bool = False, kind: type[Stage] = Stage, momentum: float = 0.1
) -> Net:
    """A WRN of depth 6n+4 and width factor k; `kind`: of the stages before the last; `momentum`: of the final norm."""
    widths = (16, 16 * k, 32 * k, 64 * k)
    stages = [
        (Stage if g == 2 else kind)(
            *(block(c_in if i == 0 else c_out, c_out, stride if i == 0 else 1, entry=g == 0 or i > 0) for i in range(n)),
            norm=nn.BatchNorm2d(c_out, momentum=momentum if g == 2 else 0.1),
            act=nn.ReLU(),
        )
        for g, (c_in, c_out, stride) in enumerate(zip(widths, widths[1:], (1, 2, 2), strict=False))
    ]
    return Net(nn.Conv2d(3, 16, 3, 1, 1, bias=bias), stages, nn.Linear(widths[-1], num_classes))


def wrn(n: int, k: int, num_classes: int) -> Net:
    net = assembled(n, k, num_classes, PreActBlock)
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, 0, math.sqrt(2 / (m.kernel_size[0] * m.kernel_size[1] * m.out_channels)))
    nn.init.zeros_(net.head.bias)  # type: ignore[arg-type]
    return net


def published_key(key: str) -> str:
    """The key of a tensor in checkpoints (RepDistiller: blockN.layer; CSKD, REFILLED: layerN) -> ours."""
    key = re.sub(r"^conv1\.", "stem.", key)
    key = re.sub(r"^(?:block(\d)\.layer|layer(\d))\.", lambda m: f"stages.{int(m[1] or m[2]) - 1}.blocks.", key)
    key = re.sub(r"^stages\.([12])\.blocks\.0\.bn1\.", lambda m: f"stages.{int(m[1]) - 1}.norm.", key)
    key = re.sub(r"^bn1?\.", "stages.2.norm.", key)
    key = re.sub(r"\.(convShortcut|shortcut\.0)\.", ".shortcut.", key)
    return re.sub(r"^(fc|linear)\.", "head.", key)


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
