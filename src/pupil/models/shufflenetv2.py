"""ShuffleNet V2 for small images: Ma et al., ECCV 2018, arXiv:1807.11164, a 1x1 stem without stride and pool.

`ShuffleV2` is width 1 as in RepDistiller, SimKD and mdistiller, ShuffleNetV2 in spot-adaptive KD; `ShuffleV2_0_2`,
`_0_5`, `_1_5` and `_2_0` are SimKD's (width 2 has 224 channels where the paper has 244).  The last 1x1 convolution is the neck.
In what is before the ReLU of a map, one half follows the other: the shuffle comes after the ReLU, so the channels of map
and pre-activation differ in order, as in RepDistiller.  Deviation: the pool adapts to any input size (RepDistiller's is a
fixed 4x4).
"""

import re

import torch
from torch import Tensor, nn

from pupil.net import Net, Stage

STEM = 24


class ShuffleUnit(nn.Module):
    """Half of the channels pass, the others are convolved; with stride 2 both halves are made from all channels.

    Then ReLU (which changes nothing in channels that pass) and shuffle; the last unit of a stage leaves both to the stage.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, last: bool) -> None:
        super().__init__()
        half = c_out // 2
        self.left = None
        if stride == 2:
            self.left = nn.Sequential(*each_channel(c_in, stride), nn.Conv2d(c_in, half, 1, bias=False), nn.BatchNorm2d(half))
        self.right = nn.Sequential(
            nn.Conv2d(half if stride == 1 else c_in, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            *each_channel(half, stride),
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
        )
        self.out = nn.Identity() if last else activation()

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1) if self.left is None else (self.left(x), x)
        return self.out(torch.cat((left, self.right(right)), 1))


def each_channel(c: int, stride: int) -> tuple[nn.Module, nn.Module]:
    """A 3x3 convolution of each channel alone, and its batch norm."""
    return nn.Conv2d(c, c, 3, stride, 1, groups=c, bias=False), nn.BatchNorm2d(c)


def activation() -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), nn.ChannelShuffle(2))


def shufflenetv2(widths: tuple[int, int, int], neck_width: int, depths: tuple[int, int, int], num_classes: int) -> Net:
    """`widths`: channels of the stages; `depths`: units of the stages."""
    stem = nn.Sequential(nn.Conv2d(3, STEM, 1, bias=False), nn.BatchNorm2d(STEM), nn.ReLU())
    stages = [
        Stage(
            *(ShuffleUnit(c_in if i == 0 else c_out, c_out, 2 if i == 0 else 1, last=i == n - 1) for i in range(n)),
            act=activation(),
        )
        for n, c_in, c_out in zip(depths, (STEM, *widths), widths, strict=False)
    ]
    neck = nn.Sequential(nn.Conv2d(widths[-1], neck_width, 1, bias=False), nn.BatchNorm2d(neck_width), nn.ReLU())
    return Net(stem, stages, nn.Linear(neck_width, num_classes), neck)


def published_key(key: str) -> str:
    """The key of a tensor in the authors' checkpoints -> ours."""
    key = re.sub(r"^conv1\.", "stem.0.", key)
    key = re.sub(r"^bn1\.", "stem.1.", key)
    key = re.sub(r"^conv2\.", "neck.0.", key)
    key = re.sub(r"^bn2\.", "neck.1.", key)
    key = re.sub(r"^layer(\d)\.(\d)\.(conv|bn)(\d)\.", lambda m: place(int(m[1]), int(m[2]), m[3], int(m[4])), key)
    return re.sub(r"^linear\.", "head.", key)


def place(layer: int, unit: int, kind: str, number: int) -> str:
    """The first unit of a layer has convolutions 1 and 2 on the left, 3 to 5 on the right; the others 1 to 3 there."""
    side, positions = "right", (0, 3, 5)  # of the convolutions; their batch norms follow them
    if unit == 0 and number <= 2:
        side, positions = "left", (0, 2)
    elif unit == 0:
        number -= 2
    return f"stages.{layer - 1}.blocks.{unit}.{side}.{positions[number - 1] + (kind == 'bn')}."


def ShuffleV2(num_classes: int) -> Net:
    return shufflenetv2((116, 232, 464), 1024, (4, 8, 4), num_classes)


def ShuffleV2_0_2(num_classes: int) -> Net:
    return shufflenetv2((40, 80, 160), 512, (4, 4, 4), num_classes)


def ShuffleV2_0_5(num_classes: int) -> Net:
    return shufflenetv2((48, 96, 192), 1024, (4, 8, 4), num_classes)


def ShuffleV2_1_5(num_classes: int) -> Net:
    return shufflenetv2((176, 352, 704), 1024, (4, 8, 4), num_classes)


def ShuffleV2_2_0(num_classes: int) -> Net:
    return shufflenetv2((224, 488, 976), 2048, (4, 8, 4), num_classes)
