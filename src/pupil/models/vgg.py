"""VGG for small images: Simonyan & Zisserman, ICLR 2015, arXiv:1409.1556, one linear layer after the pool.

Five blocks as in RepDistiller; the first is the stem.  `vgg8` and the like have batch norm (RepDistiller's
constructors `vgg8_bn`, ...), `vgg8_plain` has not (its `vgg8`).  The pool before the last block is there where the map
is 8 pixels or more, which is RepDistiller's rule at 32 and 64 pixels and spot-adaptive KD's at every size.
"""

import math
import re

from torch import Tensor, nn

from pupil.net import Net, Stage

S = ((64,), (128,), (256,), (512,), (512,))
A = ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2)
B = ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2)
D = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)
E = ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4)


class PoolLarge(nn.Module):
    """Halves maps of 8 pixels and more."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool2d(x, 2) if x.shape[2] >= 8 else x


def vgg(blocks: tuple[tuple[int, ...], ...], batch_norm: bool, num_classes: int) -> Net:
    widths = [block[-1] for block in blocks]
    stem = nn.Sequential(convs(3, blocks[0], batch_norm), nn.ReLU())
    pools = [nn.MaxPool2d(2), nn.MaxPool2d(2), nn.MaxPool2d(2), PoolLarge()]
    stages = [
        Stage(pool, convs(c_in, block, batch_norm), act=nn.ReLU())
        for pool, c_in, block in zip(pools, widths, blocks[1:], strict=False)
    ]
    head = nn.Linear(512, num_classes)
    net = Net(stem, stages, head)
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, 0, math.sqrt(2 / (9 * m.out_channels)))
            nn.init.zeros_(m.bias)  # type: ignore[arg-type]
    nn.init.normal_(head.weight, 0, 0.01)
    nn.init.zeros_(head.bias)
    return net


def convs(c_in: int, widths: tuple[int, ...], batch_norm: bool) -> nn.Sequential:
    """3x3 convolutions with ReLUs between them, none after the last."""
    layers: list[nn.Module] = []
    for c_out in widths:
        norm = [nn.BatchNorm2d(c_out)] if batch_norm else []
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1), *norm, nn.ReLU(inplace=True)]
        c_in = c_out
    return nn.Sequential(*layers[:-1])


def published_key(key: str) -> str:
    """The key of a tensor in the authors' checkpoints -> ours."""
    key = re.sub(r"^block0\.", "stem.0.", key)
    key = re.sub(r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.1.", key)
    return re.sub(r"^classifier\.", "head.", key)


def vgg8(num_classes: int) -> Net:
    return vgg(S, True, num_classes)


def vgg11(num_classes: int) -> Net:
    return vgg(A, True, num_classes)


def vgg13(num_classes: int) -> Net:
    return vgg(B, True, num_classes)


def vgg16(num_classes: int) -> Net:
    return vgg(D, True, num_classes)


def vgg19(num_classes: int) -> Net:
    return vgg(E, True, num_classes)


def vgg8_plain(num_classes: int) -> Net:
    return vgg(S, False, num_classes)


def vgg11_plain(num_classes: int) -> Net:
    return vgg(A, False, num_classes)


def vgg13_plain(num_classes: int) -> Net:
    return vgg(B, False, num_classes)


def vgg16_plain(num_classes: int) -> Net:
    return vgg(D, False, num_classes)


def vgg19_plain(num_classes: int) -> Net:
    return vgg(E, False, num_classes)
