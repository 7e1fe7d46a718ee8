"""MobileNetV2 for ImageNet: Sandler et al., CVPR 2018, arXiv:1801.04381; width 1, ReLU6, dropout before the head.

SimKD's, which is torchvision's.  The maps are the signed outputs of blocks 3, 6, 13 and 17 (linear bottlenecks: no
ReLU follows, so each is its own pre-activation); the last 1x1 convolution is the neck.
"""

import re

from torch import Tensor, nn

from pupil.net import Net, Stage

STAGES = (  # (expansion, width, stride) of each block
    ((1, 16, 1), (6, 24, 2), (6, 24, 1)),
    ((6, 32, 2), (6, 32, 1), (6, 32, 1)),
    ((6, 64, 2), *((6, 64, 1),) * 3, *((6, 96, 1),) * 3),
    ((6, 160, 2), (6, 160, 1), (6, 160, 1), (6, 320, 1)),
)
LAST = 1280


class InvertedResidual(nn.Module):
    """1x1 (unless `expand` is 1), 3x3 by channel, linear 1x1; a shortcut where the shapes agree."""

    def __init__(self, expand: int, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        inner = c_in * expand
        self.expand = nn.Identity() if expand == 1 else conv(c_in, inner, 1)
        self.depthwise = conv(inner, inner, 3, stride, groups=inner)
        self.project = nn.Sequential(nn.Conv2d(inner, c_out, 1, bias=False), nn.BatchNorm2d(c_out))
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        h = self.project(self.depthwise(self.expand(x)))
        return x + h if self.residual else h


class DropoutLinear(nn.Linear):
    """A classifier that drops elements of the embedding while it is trained."""

    def __init__(self, in_features: int, out_features: int, drop: float) -> None:
        super().__init__(in_features, out_features)
        self.drop = nn.Dropout(drop)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self.drop(input))


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(c_out), nn.ReLU6(inplace=True))


def imagenet_mobilenet_v2(num_classes: int) -> Net:
    stages, c = [], 32
    for blocks in STAGES:
        layers = []
        for expand, c_out, stride in blocks:
            layers.append(InvertedResidual(expand, c, c_out, stride))
            c = c_out
        stages.append(Stage(*layers, act=nn.Identity()))
    head = DropoutLinear(LAST, num_classes, drop=0.2)
    net = Net(conv(3, 32, 3, 2), stages, head, neck=conv(c, LAST, 1))
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out")
    nn.init.normal_(head.weight, 0, 0.01)
    nn.init.zeros_(head.bias)
    return net


def published_key(key: str) -> str:
    """The key of a tensor in torchvision's and SimKD's checkpoints -> ours."""
    places = [f"stages.{s}.blocks.{b}." for s, blocks in enumerate(STAGES) for b in range(len(blocks))]
    key = re.sub(r"^features\.0\.", "stem.", key)
    key = re.sub(rf"^features\.{len(places) + 1}\.", "neck.", key)
    # the first block has no expansion: its layers are numbered one lower
    key = re.sub(r"^features\.1\.conv\.(\d)\.", lambda m: f"features.1.conv.{int(m[1]) + 1}.", key)
    key = re.sub(r"\.conv\.0\.", ".expand.", key)
    key = re.sub(r"\.conv\.1\.", ".depthwise.", key)
    key = re.sub(r"\.conv\.([23])\.", lambda m: f".project.{int(m[1]) - 2}.", key)
    key = re.sub(r"^features\.(\d+)\.", lambda m: places[int(m[1]) - 1], key)
    return re.sub(r"^classifier\.1\.", "head.", key)
