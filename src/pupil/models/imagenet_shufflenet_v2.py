"""ShuffleNetV2 for ImageNet: Ma et al., ECCV 2018, arXiv:1807.11164; torchvision's.

SimKD's copy lost its last convolution and cannot run; here it is the neck.  The stem's map is after the max-pool.  The
last block of a stage leaves its ReLU to the stage, so a pre-activation has its map's order of channels.
Initialisation: torch's own.
"""

import re

import torch
from torch import Tensor, nn

from pupil.net import Net, Stage

DEPTHS = (4, 8, 4)


class DownBlock(nn.Module):
    """Halves the map; two branches side by side."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.left = nn.Sequential(*depthwise(c_in, 2), *pointwise(c_in, c_out // 2))
        self.right = branch(c_in, c_out // 2, 2, last=False)

    def forward(self, x: Tensor) -> Tensor:
        return shuffled(self.left(x), self.right(x))


class HalfBlock(nn.Module):
    """Half of the channels pass, the others go through a branch."""

    def __init__(self, c: int, last: bool) -> None:
        super().__init__()
        self.right = branch(c // 2, c // 2, 1, last)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        return shuffled(left, self.right(right))


def branch(c_in: int, c_out: int, stride: int, last: bool) -> nn.Sequential:
    layers = (*pointwise(c_in, c_out), *depthwise(c_out, stride), *pointwise(c_out, c_out))
    return nn.Sequential(*(layers[:-1] if last else layers))


def pointwise(c_in: int, c_out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)


def depthwise(c: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(c, c, 3, stride, 1, groups=c, bias=False), nn.BatchNorm2d(c)


def shuffled(left: Tensor, right: Tensor) -> Tensor:
    """(B, C, H, W), (B, C, H, W) -> (B, 2C, H, W), the channels in turn"""
    return torch.stack((left, right), dim=2).flatten(1, 2)


def shufflenet(widths: tuple[int, int, int, int], num_classes: int) -> Net:
    """`widths` of the three stages and the neck."""
    stem = nn.Sequential(
        nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
    )
    stages, c = [], 24
    for n, c_out in zip(DEPTHS, widths, strict=False):
        rest = (HalfBlock(c_out, last=i == n - 1) for i in range(1, n))
        stages.append(Stage(DownBlock(c, c_out), *rest, act=nn.ReLU()))
        c = c_out
    return Net(stem, stages, nn.Linear(widths[-1], num_classes), neck=nn.Sequential(*pointwise(c, widths[-1])))


def published_key(key: str) -> str:
    """The key of a tensor in torchvision's checkpoints -> ours."""
    key = re.sub(r"^conv1\.", "stem.", key)
    key = re.sub(r"^stage(\d)\.", lambda m: f"stages.{int(m[1]) - 2}.blocks.", key)
    key = key.replace(".branch1.", ".left.").replace(".branch2.", ".right.")
    key = re.sub(r"^conv5\.", "neck.", key)
    return re.sub(r"^fc\.", "head.", key)


def imagenet_shufflenet_v2_x0_5(num_classes: int) -> Net:
    return shufflenet((48, 96, 192, 1024), num_classes)


def imagenet_shufflenet_v2_x1_0(num_classes: int) -> Net:
    return shufflenet((116, 232, 464, 1024), num_classes)


def imagenet_shufflenet_v2_x1_5(num_classes: int) -> Net:
    return shufflenet((176, 352, 704, 1024), num_classes)


def imagenet_shufflenet_v2_x2_0(num_classes: int) -> Net:
    return shufflenet((244, 488, 976, 2048), num_classes)
