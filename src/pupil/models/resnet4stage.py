"""ResNets of four stages for small images: He et al., CVPR 2016, arXiv:1512.03385, depths and blocks of its table 1.

`ResNet50` and the like are RepDistiller's, spot-adaptive KD's and mdistiller's CIFAR networks of these names: the
stem is one 3x3 convolution and no pool, stages of 64 to 512 channels (bottlenecks: times 4) with strides 1, 2, 2, 2; a
bottleneck's stride is in its 3x3.  Not the ImageNet networks.
"""

import re

from torch import Tensor, nn

from pupil.models.resnet import BasicBlock
from pupil.net import Net, Stage


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut; the last block of a stage leaves its ReLU to the stage."""

    def __init__(self, c_in: int, c_out: int, stride: int, last: bool) -> None:
        super().__init__()
        mid = c_out // 4
        self.conv1 = nn.Conv2d(c_in, mid, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = nn.Conv2d(mid, mid, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = nn.Conv2d(mid, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.out = nn.Identity() if last else nn.ReLU(inplace=True)
        same = stride == 1 and c_in == c_out
        self.downsample = None if same else nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(h)))))
        return self.out(h + shortcut)


def resnet(block: type[BasicBlock] | type[Bottleneck], depths: tuple[int, int, int, int], num_classes: int) -> Net:
    """`depths`: blocks of each stage."""
    widths = [64, *(w * (4 if block is Bottleneck else 1) for w in (64, 128, 256, 512))]
    stem = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    stages = [
        Stage(
            *(block(c_in if i == 0 else c_out, c_out, stride if i == 0 else 1, last=i == n - 1) for i in range(n)),
            act=nn.ReLU(),
        )
        for n, c_in, c_out, stride in zip(depths, widths, widths[1:], (1, 2, 2, 2), strict=False)
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
    key = key.replace(".shortcut.", ".downsample.")
    return re.sub(r"^linear\.", "head.", key)


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
