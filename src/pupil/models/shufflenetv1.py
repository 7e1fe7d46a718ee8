"""ShuffleNet for small images: Zhang et al., CVPR 2018, arXiv:1707.01083, three groups, 240 to 960 channels.

`ShuffleV1` is the network of that name of RepDistiller, SimKD and mdistiller, ShuffleNetV1 of spot-adaptive KD.  Those
authors' changes to the paper: a 1x1 stem without stride and pool, and a ReLU after the 3x3 convolution.  Deviation: the
pool adapts to any input size (RepDistiller's is a fixed 4x4).
"""

import re

import torch
from torch import Tensor, nn

from pupil.net import Net, Stage

STEM, GROUPS = 24, 3


class ShuffleUnit(nn.Module):
    """Grouped 1x1, shuffle, 3x3 of each channel, grouped 1x1, added to the input, or, with stride 2, put before it.

    The last unit of a stage leaves its ReLU to the stage; units on the stem do not group the first 1x1.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, last: bool) -> None:
        super().__init__()
        branch = c_out - c_in if stride == 2 else c_out
        mid, groups = branch // 4, 1 if c_in == STEM else GROUPS
        self.conv1 = nn.Conv2d(c_in, mid, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.shuffle = nn.ChannelShuffle(groups)
        self.conv2 = nn.Conv2d(mid, mid, 3, stride, 1, groups=mid, bias=False)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = nn.Conv2d(mid, branch, 1, groups=GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(branch)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AvgPool2d(3, 2, 1) if stride == 2 else None
        self.out = nn.Identity() if last else nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.shuffle(self.relu(self.bn1(self.conv1(x))))
        h = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(h)))))
        return self.out(h + x if self.pool is None else torch.cat((h, self.pool(x)), 1))


def ShuffleV1(num_classes: int) -> Net:
    widths = (STEM, 240, 480, 960)
    stem = nn.Sequential(nn.Conv2d(3, STEM, 1, bias=False), nn.BatchNorm2d(STEM), nn.ReLU())
    stages = [
        Stage(
            *(ShuffleUnit(c_in if i == 0 else c_out, c_out, 2 if i == 0 else 1, last=i == n - 1) for i in range(n)),
            act=nn.ReLU(),
        )
        for n, c_in, c_out in zip((4, 8, 4), widths, widths[1:], strict=False)
    ]
    return Net(stem, stages, nn.Linear(widths[-1], num_classes))


def published_key(key: str) -> str:
    """The key of a tensor in the authors' checkpoints -> ours."""
    key = re.sub(r"^conv1\.", "stem.0.", key)
    key = re.sub(r"^bn1\.", "stem.1.", key)
    key = re.sub(r"^layer(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.", key)
    return re.sub(r"^linear\.", "head.", key)
