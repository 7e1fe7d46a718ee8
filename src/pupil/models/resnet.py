"""CIFAR ResNets, post-activation: He et al., CVPR 2016, arXiv:1512.03385, section 4.2.

Depth 6n+2 and the widths of stem and stages are those of RepDistiller and SimKD ("x2" doubles the stages, "x4" doubles
the stem and quadruples the stages).  SimKD calls some of them wide ResNets: its "wrn_40_1" is resnet38 here, wrn_16_2
resnet14x2, wrn_40_2 resnet38x2, wrn_16_4 resnet14x4, wrn_40_4 resnet38x4; the real, pre-activation ones are in `wrn`.
Deviation: the pool adapts to any input size (the authors' is a fixed 8x8).
"""

from torch import nn

from pupil.models.residual import BasicBlock, initialised, small_stem, stage
from pupil.models.residual import published_key as published_key
from pupil.net import Net

Widths = tuple[int, int, int, int]  # stem, stages 1 to 3


def resnet(n: int, widths: Widths, num_classes: int) -> Net:
    """A ResNet of depth 6n+2."""
    shapes = zip(widths, widths[1:], (1, 2, 2), strict=False)
    stem, stages = small_stem(widths[0]), [stage(BasicBlock, n, *shape) for shape in shapes]
    return initialised(Net(stem, stages, nn.Linear(widths[-1], num_classes)))


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
