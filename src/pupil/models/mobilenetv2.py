"""MobileNetV2 for small images: Sandler et al., CVPR 2018, arXiv:1801.04381, with RepDistiller's changes.

`MobileNetV2` is width 0.5 as in RepDistiller ("MobileNetV2" of its tables), SimKD and mdistiller; `MobileNetV2_1_0` is
width 1.0 as SimKD's network of that name and spot-adaptive KD's MobileNetV2.  Those authors' changes to the paper: ReLU
and not ReLU6, an expansion also in the first block, a second group without stride, 1280 channels before the pool at
every width.  The maps are the signed outputs of linear bottlenecks; the last 1x1 convolution is the neck.  Deviation: the
pool adapts to any input size (RepDistiller's is a fixed 2x2).
"""

import math
import re

from torch import Tensor, nn

from pupil.net import Net, Stage

# expansion, channels, blocks, stride of each group; a tap after groups 1, 2, 4 and 6
GROUPS = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
STAGES = ((0, 1), (2,), (3, 4), (5, 6))


class LinearBottleneck(nn.Module):
    """1x1 that expands, 3x3 of each channel, 1x1 without activation; a shortcut where the shape stays."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int, act: type[nn.Module], bias: bool) -> None:
        super().__init__()
        mid = c_in * expansion
        self.conv = nn.Sequential(
            nn.Conv2d(c_in, mid, 1, bias=bias),
            nn.BatchNorm2d(mid),
            act(),
            nn.Conv2d(mid, mid, 3, stride, 1, groups=mid, bias=bias),
            nn.BatchNorm2d(mid),
            act(),
            nn.Conv2d(mid, c_out, 1, bias=bias),
            nn.BatchNorm2d(c_out),
        )
        self.shortcut = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


def group(
    c_in: int, c_out: int, blocks: int, stride: int, expansion: int, act: type[nn.Module] = nn.ReLU, bias: bool = False
) -> nn.Sequential:
    """Blocks of one width; the first has the stride."""
    return nn.Sequential(
        *(
            LinearBottleneck(c_in if i == 0 else c_out, c_out, stride if i == 0 else 1, expansion, act, bias)
            for i in range(blocks)
        )
    )


def mobilenetv2(width: float, num_classes: int) -> Net:
    c = stem_width = int(32 * width)
    groups = []
    for expansion, channels, blocks, stride in GROUPS:
        c_out = int(channels * width)
        groups.append(group(c, c_out, blocks, stride, expansion))
        c = c_out
    stem = nn.Sequential(nn.Conv2d(3, stem_width, 3, 2, 1, bias=False), nn.BatchNorm2d(stem_width), nn.ReLU())
    stages = [Stage(*(groups[g] for g in stage), act=nn.Identity()) for stage in STAGES]
    neck = nn.Sequential(nn.Conv2d(c, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU())
    head = nn.Linear(1280, num_classes)
    net = Net(stem, stages, head, neck)
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, 0, math.sqrt(2 / (m.kernel_size[0] * m.kernel_size[1] * m.out_channels)))
    nn.init.normal_(head.weight, 0, 0.01)
    nn.init.zeros_(head.bias)
    return net


def published_key(key: str) -> str:
    """The key of a tensor in the authors' checkpoints -> ours."""
    key = re.sub(r"^conv1\.", "stem.", key)
    key = re.sub(r"^blocks\.(\d)\.", lambda m: place(int(m[1])), key)
    key = re.sub(r"^conv2\.", "neck.", key)
    return re.sub(r"^classifier\.0\.", "head.", key)


def place(g: int) -> str:
    """Where the group of this number is."""
    stage = next(i for i, groups in enumerate(STAGES) if g in groups)
    return f"stages.{stage}.blocks.{STAGES[stage].index(g)}."


def MobileNetV2(num_classes: int) -> Net:
    return mobilenetv2(0.5, num_classes)


def MobileNetV2_1_0(num_classes: int) -> Net:
    return mobilenetv2(1.0, num_classes)
