"""ImageNet ResNets, the stride in the 3x3 as in torchvision: He et al., CVPR 2016, arXiv:1512.03385; ResNeXt (Xie et
al., CVPR 2017, arXiv:1611.05431); wide ResNets (Zagoruyko & Komodakis, BMVC 2016, arXiv:1605.07146).

SimKD's set ("x2" multiplies the widths of the stages, not of the stem); CSKD's resnets are the same networks with
another number of classes.  The stem's map is after the max-pool; `mdistiller_resnet50` and the like are the same with
that map before it.  Deviation: the pool before the head adapts to any input size (CSKD's and mdistiller's is 7x7).
"""

import re
from collections.abc import Sequence
from functools import partial

from torch import nn

from pupil.models import residual
from pupil.models.residual import BasicBlock, Block, Bottleneck, initialised, stage
from pupil.net import Net

Depths = tuple[int, int, int, int]  # blocks in each stage


def plain(depths: Depths, num_classes: int, *, widen: int = 1, pool_in_stem: bool = True) -> Net:
    """Of basic blocks; `widen` multiplies the widths of the stages."""
    widths = [64 * widen * 2**g for g in range(4)]
    return assembled(depths, widths, [BasicBlock] * 4, num_classes, pool_in_stem)


def bottleneck(depths: Depths, num_classes: int, *, groups: int = 1, inner: int = 64, pool_in_stem: bool = True) -> Net:
    """Of bottlenecks; `inner` is the width of the first stage's 3x3 convolutions, in `groups` groups."""
    blocks = [partial(Bottleneck, inner=inner * 2**g, groups=groups) for g in range(4)]
    return assembled(depths, [256 * 2**g for g in range(4)], blocks, num_classes, pool_in_stem)


def assembled(depths: Depths, widths: Sequence[int], blocks: Sequence[Block], num_classes: int, pool_in_stem: bool) -> Net:
    """`blocks`: what builds the blocks of each stage.  The max-pool ends the stem or begins the first stage."""
    pool, nothing = nn.MaxPool2d(3, 2, 1), nn.Identity()
    stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    entries = [pool, nothing, nothing, nothing]
    if pool_in_stem:
        stem.append(pool)
        entries[0] = nothing
    shapes = zip(blocks, depths, (64, *widths), widths, (1, 2, 2, 2), entries, strict=False)
    return initialised(Net(stem, [stage(*shape) for shape in shapes], nn.Linear(widths[-1], num_classes)))


def published_key(key: str) -> str:
    """The key of a tensor in the authors' checkpoints, and torchvision's -> ours, whose blocks come after the entry."""
    key = residual.published_key(key)
    return re.sub(r"^(stages\.\d\.blocks)\.(\d+)\.", lambda m: f"{m[1]}.{int(m[2]) + 1}.", key)


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
