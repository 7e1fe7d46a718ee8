"""Spot-adaptive KD's VGGs for ImageNet and Tiny-ImageNet: Song et al., IEEE TIP 2022, doi 10.1109/TIP.2022.3170728.

The convolutions of `vgg` with batch norm, a fifth max-pool, a mean to 7x7 and three linear layers with dropout, as in
Simonyan & Zisserman, ICLR 2015, arXiv:1409.1556.  `last` is the pooled map (B, 512, 7, 7).  Deviation: the embedding
is what the last linear layer sees (B, 4096), so that methods find a linear classifier; the authors' is `last`, flattened.
"""

import re

from torch import Tensor, nn

from pupil.models import vgg
from pupil.net import Net

WIDTH = 4096


class FullyConnected(nn.Module):
    """(B, 512, H, W) -> the pooled map (B, 512, 7, 7), the embedding (B, 4096)."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.Sequential(nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(7))
        first, second = nn.Linear(512 * 7 * 7, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.Sequential(first, nn.ReLU(), nn.Dropout(), second, nn.ReLU(), nn.Dropout())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.pool(x)
        return pooled, self.layers(pooled.flatten(1))


def vgg_imagenet(blocks: tuple[tuple[int, ...], ...], num_classes: int) -> Net:
    net = vgg.vgg(blocks, True, num_classes)
    net.name = f"spot_vgg{sum(map(len, blocks)) + 3}_imagenet"
    net.pool, net.head, net.pools_last = FullyConnected(), nn.Linear(WIDTH, num_classes), False
    for m in (*net.pool.modules(), net.head):
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, 0, 0.01)
            nn.init.zeros_(m.bias)
    return net


def published_key(key: str) -> str:
    """The key of a tensor in the authors' checkpoints -> ours."""
    key = re.sub(r"^classifier\.([03])\.", r"pool.layers.\1.", key)
    return vgg.published_key(key.replace("classifier.6.", "classifier."))


def spot_vgg8_imagenet(num_classes: int) -> Net:
    return vgg_imagenet(vgg.S, num_classes)


def spot_vgg11_imagenet(num_classes: int) -> Net:
    return vgg_imagenet(vgg.A, num_classes)


def spot_vgg13_imagenet(num_classes: int) -> Net:
    return vgg_imagenet(vgg.B, num_classes)


def spot_vgg16_imagenet(num_classes: int) -> Net:
    return vgg_imagenet(vgg.D, num_classes)


def spot_vgg19_imagenet(num_classes: int) -> Net:
    return vgg_imagenet(vgg.E, num_classes)
