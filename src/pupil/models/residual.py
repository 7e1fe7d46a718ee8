"""What the post-activation ResNets share: blocks, stages, initialisation and the names in published checkpoints.

Blocks: He et al., CVPR 2016, arXiv:1512.03385; a bottleneck's stride is in its 3x3.
"""

import re
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from pupil.net import Net, Stage


def shortcut(c_in: int, c_out: int, stride: int) -> nn.Module | None:
    """A 1x1 convolution where the shape changes; None: the input as it is."""
    same = stride == 1 and c_in == c_out
    return None if same else nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the last block of a stage leaves its ReLU to the stage."""

    def __init__(self, c_in: int, c_out: int, stride: int, last: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.out = nn.Identity() if last else nn.ReLU(inplace=True)
        self.downsample = shortcut(c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.out(h + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut; `inner` channels in the 3x3 (by default a quarter), in `groups` groups."""

    def __init__(self, c_in: int, c_out: int, stride: int, last: bool, inner: int | None = None, groups: int = 1) -> None:
        super().__init__()
        mid = c_out // 4 if inner is None else inner
        self.conv1 = nn.Conv2d(c_in, mid, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = nn.Conv2d(mid, mid, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = nn.Conv2d(mid, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.out = nn.Identity() if last else nn.ReLU(inplace=True)
        self.downsample = shortcut(c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.out(self.bn3(self.conv3(h)) + (x if self.downsample is None else self.downsample(x)))


N = TypeVar("N", bound=Net)
Block = Callable[..., nn.Module]  # of c_in, c_out, stride, last


def small_stem(width: int) -> nn.Sequential:
    """For small images: one 3x3 convolution and no pool."""
    return nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


def stage(block: Block, n: int, c_in: int, c_out: int, stride: int, *before: nn.Module) -> Stage:
    """n blocks, the first of which strides and widens; `before`: what comes ahead of them."""
    blocks = (block(c_in if i == 0 else c_out, c_out, stride if i == 0 else 1, last=i == n - 1) for i in range(n))
    return Stage(*before, *blocks, act=nn.ReLU())


def initialised(net: N) -> N:
    """Convolutions as in the paper; the rest as torch does."""
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    return net


def published_key(key: str) -> str:
    """The key of a tensor in the authors' checkpoints -> ours."""
    key = re.sub(r"^conv1\.", "stem.0.", key)
    key = re.sub(r"^bn1\.", "stem.1.", key)
    key = re.sub(r"^layer(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.", key)
    key = key.replace(".shortcut.", ".downsample.")
    return re.sub(r"^(fc|linear)\.", "head.", key)
