"""ResNets of four stages for small images: He et al., CVPR 2016, arXiv:1512.03385, depths and blocks of its table 1.

`ResNet50` and the like are RepDistiller's, spot-adaptive KD's and mdistiller's CIFAR networks of these names: the
stem is one 3x3 convolution and no pool, stages of 64 to 512 channels (bottlenecks: times 4) with strides 1, 2, 2, 2; a
bottleneck's stride is in its 3x3.  Not the ImageNet networks.
"""

from torch import nn

from pupil.models.residual import BasicBlock, Bottleneck, initialised, small_stem, stage
from pupil.models.residual import published_key as published_key
from pupil.net import Net


def resnet(block: type[BasicBlock] | type[Bottleneck], depths: tuple[int, int, int, int], num_classes: int) -> Net:
    """`depths`: blocks of each stage."""
    widths = [64, *(w * (4 if block is Bottleneck else 1) for w in (64, 128, 256, 512))]
    shapes = zip(depths, widths, widths[1:], (1, 2, 2, 2), strict=False)
    stem, stages = small_stem(64), [stage(block, *shape) for shape in shapes]
    return initialised(Net(stem, stages, nn.Linear(widths[-1], num_classes)))


def ResNet18(num_classes: int) -> Net:
    return resnet(BasicBlock, (2, 2, 2, 2), num_classes)


def ResNet34(num_classes: int) -> Net:
    return resnet(BasicBlock, (3, 4, 6, 3), num_classes)


def ResNet50(num_classes: int) -> Net:
    return resnet(Bottleneck, (3, 4, 6, 3), num_classes)


def ResNet101(num_classes: int) -> Net:
    return resnet(Bottleneck, (3, 4, 23, 3), num_classes)


def ResNet152(num_classes: int) -> Net:
    return resnet(Bottleneck, (3, 8, 36, 3), num_classes)
