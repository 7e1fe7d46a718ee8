"""The table of networks: a row is a function from the number of classes to a `Net`."""

from collections.abc import Callable

from pupil.models import resnet, vgg, wrn
from pupil.net import Net

NETWORKS: dict[str, Callable[[int], Net]] = {
    f.__name__: f
    for f in (
        resnet.resnet8,
        resnet.resnet14,
        resnet.resnet20,
        resnet.resnet32,
        resnet.resnet44,
        resnet.resnet56,
        resnet.resnet110,
        resnet.resnet8x4,
        resnet.resnet32x4,
        vgg.vgg8,
        vgg.vgg11,
        vgg.vgg13,
        vgg.vgg16,
        vgg.vgg19,
        vgg.vgg8_plain,
        vgg.vgg11_plain,
        vgg.vgg13_plain,
        vgg.vgg16_plain,
        vgg.vgg19_plain,
        wrn.wrn_16_1,
        wrn.wrn_16_2,
        wrn.wrn_40_1,
        wrn.wrn_40_2,
    )
}


def build(name: str, num_classes: int) -> Net:
    """A freshly initialised network; its weights come from the global random generator."""
    return NETWORKS[name](num_classes)
