"""CIFAR ResNets, post-activation: He et al., CVPR 2016, arXiv:1512.03385, section 4.2.

Depth 6n+2 and the widths of stem and stages are those of RepDistiller and SimKD ("x2" doubles the stages, "x4" doubles
the stem and quadruples the stages).  SimKD calls some of them wide ResNets: its "wrn_40_1" is resnet38 here, wrn_16_2
resnet14x2, wrn_40_2 resnet38x2, wrn_16_4 resnet14x4, wrn_40_4 resnet38x4; the real, pre-activation ones are in `wrn`.
Deviation: the pool adapts to any input size (the authors' is a fixed 8x8).
"""

import re

from torch import Tensor, nn

from pupil.net import Net, Stage

Widths = tuple[int, int, int, int]  # stem, stages 1 to 3


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
        same = stride == 1 and c_in == c_out
        self.downsample = None if same else nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        h = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.out(h + shortcut)


def resnet(n: int, widths: Widths, num_classes: int) -> Net:
    """A ResNet of depth 6n+2."""
    stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
    stages = [
        Stage(
            *(BasicBlock(c_in if i == 0 else c_out, c_out, stride if i == 0 else 1, last=i == n - 1) for i in range(n)),
            act=nn.ReLU(),
        )
        for c_in, c_out, stride in zip(widths, widths[1:], (1, 2, 2), strict=False)
    ]
    net = Net(stem, stages, nn.Linear(widths[-1], num_classes))
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    return net


def published_key(key: str) -> str:
    """The key of a tensor in the authors' checkpoints -> ours."""
    key = re.sub(r"^conv1\.", "stem.0.", key)
    key = re.sub(r"^bn1\.", "stem.1.", key)
    key = re.sub(r"^layer(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.", key)
    return re.sub(r"^fc\.", "head.", key)


X1: Widths = (16, 16, 32, 64)
X2: Widths = (16, 32, 64, 128)
X4: Widths = (32, 64, 128, 256)


def resnet8(num_classes: int) -> Net:
    return resnet(1, X1, num_classes)


def resnet14(num_classes: int) -> Net:
    return resnet(2, X1, num_classes)


def resnet20(num_classes: int) -> Net:
    return resnet(3, X1, num_classes)


def resnet32(num_classes: int) -> Net:
    return resnet(5, X1, num_classes)


def resnet38(num_classes: int) -> Net:
    return resnet(6, X1, num_classes)


def resnet44(num_classes: int) -> Net:
    return resnet(7, X1, num_classes)


def resnet56(num_classes: int) -> Net:
    return resnet(9, X1, num_classes)


def resnet110(num_classes: int) -> Net:
    return resnet(18, X1, num_classes)


def resnet116(num_classes: int) -> Net:
    return resnet(19, X1, num_classes)


def resnet200(num_classes: int) -> Net:
    return resnet(33, X1, num_classes)


def resnet14x2(num_classes: int) -> Net:
    return resnet(2, X2, num_classes)


def resnet38x2(num_classes: int) -> Net:
    return resnet(6, X2, num_classes)


def resnet110x2(num_classes: int) -> Net:
    return resnet(18, X2, num_classes)


def resnet8x4(num_classes: int) -> Net:
    return resnet(1, X4, num_classes)


def resnet14x4(num_classes: int) -> Net:
    return resnet(2, X4, num_classes)


def resnet20x4(num_classes: int) -> Net:
    return resnet(3, X4, num_classes)


def resnet26x4(num_classes: int) -> Net:
    return resnet(4, X4, num_classes)


def resnet32x4(num_classes: int) -> Net:
    return resnet(5, X4, num_classes)


def resnet38x4(num_classes: int) -> Net:
    return resnet(6, X4, num_classes)


def resnet44x4(num_classes: int) -> Net:
    return resnet(7, X4, num_classes)


def resnet56x4(num_classes: int) -> Net:
    return resnet(9, X4, num_classes)


def resnet110x4(num_classes: int) -> Net:
    return resnet(18, X4, num_classes)
