"""CIFAR ResNets whose shortcuts have no parameters: He et al., CVPR 2016, arXiv:1512.03385, option A.

As in REFILLED (Ye, Lu & Zhan, CVPR 2020): where the size halves, the shortcut takes every second pixel and pads the
channels with zeros, half of them on each side.  Initialisation: torch's own.
"""

from torch import Tensor, nn

from pupil.models.residual import BasicBlock, small_stem, stage
from pupil.models.residual import published_key as published_key
from pupil.net import Net


class PadChannels(nn.Module):
    """(B, C, H, W) -> (B, C + 2 pad, H / stride, W / stride)"""

    def __init__(self, stride: int, pad: int) -> None:
        super().__init__()
        self.stride, self.pad = stride, pad

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))


class PaddedBlock(BasicBlock):
    def __init__(self, c_in: int, c_out: int, stride: int, last: bool) -> None:
        super().__init__(c_in, c_out, stride, last)
        if self.downsample is not None:
            self.downsample = nn.Sequential(PadChannels(stride, (c_out - c_in) // 2))


def resnet_padded(n: int, num_classes: int) -> Net:
    """A ResNet of depth 6n+2."""
    shapes = ((16, 16, 1), (16, 32, 2), (32, 64, 2))
    stem, stages = small_stem(16), [stage(PaddedBlock, n, *shape) for shape in shapes]
    return Net(stem, stages, nn.Linear(64, num_classes))


def refilled_resnet20(num_classes: int) -> Net:
    return resnet_padded(3, num_classes)


def refilled_resnet32(num_classes: int) -> Net:
    return resnet_padded(5, num_classes)


def refilled_resnet44(num_classes: int) -> Net:
    return resnet_padded(7, num_classes)


def refilled_resnet56(num_classes: int) -> Net:
    return resnet_padded(9, num_classes)


def refilled_resnet110(num_classes: int) -> Net:
    return resnet_padded(18, num_classes)
