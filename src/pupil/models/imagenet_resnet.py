"""ImageNet ResNets, the stride in the 3x3 as in torchvision: He et al., CVPR 2016, arXiv:1512.03385; ResNeXt (Xie et
al., CVPR 2017, arXiv:1611.05431); wide ResNets (Zagoruyko & Komodakis, BMVC 2016, arXiv:1605.07146).

SimKD's set ("x2" multiplies the widths of the stages, not of the stem); CSKD's resnets are the same networks with
another number of classes.  The stem's map is after the max-pool; `mdistiller_resnet50` and the like are the same with
that map before it.  Deviation: the pool before the head adapts to any input size (CSKD's and mdistiller's is 7x7).
"""

import re
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from pupil.models.resnet import BasicBlock
from pupil.net import Net, Stage

Depths = tuple[int, int, int, int]  # blocks in each stage


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut; `inner` channels in the 3x3; the last block of a stage leaves its ReLU to the stage."""

    def __init__(self, c_in: int, c_out: int, stride: int, last: bool, inner: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.out = nn.Identity() if last else nn.ReLU(inplace=True)
        same = stride == 1 and c_in == c_out
        self.downsample = None if same else nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        h = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.out(self.bn3(self.conv3(h)) + shortcut)


def plain(depths: Depths, num_classes: int, *, widen: int = 1, pool_in_stem: bool = True) -> Net:
    """Of basic blocks; `widen` multiplies the widths of the stages."""
    widths = [64 * widen * 2**g for g in range(4)]
    return assembled(depths, widths, [BasicBlock] * 4, num_classes, pool_in_stem)


def bottleneck(depths: Depths, num_classes: int, *, groups: int = 1, inner: int = 64, pool_in_stem: bool = True) -> Net:
    """Of bottlenecks; `inner` is the width of the first stage's 3x3 convolutions, in `groups` groups."""
    blocks = [partial(Bottleneck, inner=inner * 2**g, groups=groups) for g in range(4)]
    return assembled(depths, [256 * 2**g for g in range(4)], blocks, num_classes, pool_in_stem)


def assembled(
    depths: Depths, widths: Sequence[int], blocks: Sequence[Callable[..., nn.Module]], num_classes: int, pool_in_stem: bool
) -> Net:
    """`blocks`: what builds the blocks of each stage.  The max-pool ends the stem or begins the first stage."""
    pool = nn.MaxPool2d(3, 2, 1)
    stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    if pool_in_stem:
        stem.append(pool)
    stages, c_in = [], 64
    for g, (n, c_out, block) in enumerate(zip(depths, widths, blocks, strict=True)):
        first = block(c_in, c_out, 1 if g == 0 else 2, last=n == 1)
        rest = (block(c_out, c_out, 1, last=i == n - 1) for i in range(1, n))
        entry = nn.Identity() if g > 0 or pool_in_stem else pool
        stages.append(Stage(entry, first, *rest, act=nn.ReLU()))
        c_in = c_out
    net = Net(stem, stages, nn.Linear(c_in, num_classes))
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    return net


def published_key(key: str) -> str:
    """The key of a tensor in the authors' checkpoints, and torchvision's -> ours."""
    key = re.sub(r"^conv1\.", "stem.0.", key)
    key = re.sub(r"^bn1\.", "stem.1.", key)
    key = re.sub(r"^layer(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{int(m[2]) + 1}.", key)
    return re.sub(r"^fc\.", "head.", key)


D10, D18, D26, D34 = (1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3), (3, 4, 6, 3)
D50, D101, D152 = (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)


def imagenet_resnet18(num_classes: int) -> Net:
    return plain(D18, num_classes)


def imagenet_resnet34(num_classes: int) -> Net:
    return plain(D34, num_classes)


def imagenet_resnet50(num_classes: int) -> Net:
    return bottleneck(D50, num_classes)


def imagenet_resnet101(num_classes: int) -> Net:
    return bottleneck(D101, num_classes)


def imagenet_resnet152(num_classes: int) -> Net:
    return bottleneck(D152, num_classes)


def imagenet_resnet10x2(num_classes: int) -> Net:
    return plain(D10, num_classes, widen=2)


def imagenet_resnet18x2(num_classes: int) -> Net:
    return plain(D18, num_classes, widen=2)


def imagenet_resnet26x2(num_classes: int) -> Net:
    return plain(D26, num_classes, widen=2)


def imagenet_resnet34x2(num_classes: int) -> Net:
    return plain(D34, num_classes, widen=2)


def imagenet_resnet34x4(num_classes: int) -> Net:
    return plain(D34, num_classes, widen=4)


def imagenet_resnext50_32x4d(num_classes: int) -> Net:
    return bottleneck(D50, num_classes, groups=32, inner=128)


def imagenet_resnext101_32x8d(num_classes: int) -> Net:
    return bottleneck(D101, num_classes, groups=32, inner=256)


def imagenet_wide_resnet50_2(num_classes: int) -> Net:
    return bottleneck(D50, num_classes, inner=128)


def imagenet_wide_resnet101_2(num_classes: int) -> Net:
    return bottleneck(D101, num_classes, inner=128)


def mdistiller_resnet18(num_classes: int) -> Net:
    return plain(D18, num_classes, pool_in_stem=False)


def mdistiller_resnet34(num_classes: int) -> Net:
    return plain(D34, num_classes, pool_in_stem=False)


def mdistiller_resnet50(num_classes: int) -> Net:
    return bottleneck(D50, num_classes, pool_in_stem=False)


def mdistiller_resnet101(num_classes: int) -> Net:
    return bottleneck(D101, num_classes, pool_in_stem=False)


def mdistiller_resnet152(num_classes: int) -> Net:
    return bottleneck(D152, num_classes, pool_in_stem=False)
