"""The table of networks: a row is a function from the number of classes to a `Net`."""

import sys
from collections.abc import Callable
from difflib import get_close_matches

from pupil.models import (
    external,
    imagenet_mobilenet_v2,
    imagenet_resnet,
    imagenet_shufflenet_v2,
    mobilenet_v1,
    mobilenetv2,
    mobilenetv2_tiny,
    resnet,
    resnet4stage,
    resnet_branches,
    resnet_padded,
    shufflenetv1,
    shufflenetv2,
    vgg,
    vgg_imagenet,
    wrn,
    wrn_biased,
)
from pupil.net import Net
from pupil.types import UserError

NETWORKS: dict[str, Callable[[int], Net]] = {
    f.__name__: f
    for f in (
        resnet.resnet8,
        resnet.resnet14,
        resnet.resnet20,
        resnet.resnet32,
        resnet.resnet38,
        resnet.resnet44,
        resnet.resnet56,
        resnet.resnet110,
        resnet.resnet116,
        resnet.resnet200,
        resnet.resnet14x2,
        resnet.resnet38x2,
        resnet.resnet110x2,
        resnet.resnet8x4,
        resnet.resnet14x4,
        resnet.resnet20x4,
        resnet.resnet26x4,
        resnet.resnet32x4,
        resnet.resnet38x4,
        resnet.resnet44x4,
        resnet.resnet56x4,
        resnet.resnet110x4,
        resnet4stage.ResNet18,
        resnet4stage.ResNet34,
        resnet4stage.ResNet50,
        resnet4stage.ResNet101,
        resnet4stage.ResNet152,
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
        vgg_imagenet.spot_vgg8_imagenet,
        vgg_imagenet.spot_vgg11_imagenet,
        vgg_imagenet.spot_vgg13_imagenet,
        vgg_imagenet.spot_vgg16_imagenet,
        vgg_imagenet.spot_vgg19_imagenet,
        wrn.wrn_16_1,
        wrn.wrn_16_2,
        wrn.wrn_40_1,
        wrn.wrn_40_2,
        wrn.wrn_28_10,
        mobilenetv2.MobileNetV2,
        mobilenetv2.MobileNetV2_1_0,
        mobilenetv2_tiny.MobileNetV2_tiny,
        shufflenetv1.ShuffleV1,
        shufflenetv2.ShuffleV2,
        shufflenetv2.ShuffleV2_0_2,
        shufflenetv2.ShuffleV2_0_5,
        shufflenetv2.ShuffleV2_1_5,
        shufflenetv2.ShuffleV2_2_0,
        wrn_biased.cskd_wrn_16_1,
        wrn_biased.cskd_wrn_40_2,
        wrn_biased.refilled_wrn_16_1,
        wrn_biased.refilled_wrn_16_2,
        wrn_biased.refilled_wrn_40_1,
        wrn_biased.refilled_wrn_40_2,
        resnet_padded.refilled_resnet20,
        resnet_padded.refilled_resnet32,
        resnet_padded.refilled_resnet44,
        resnet_padded.refilled_resnet56,
        resnet_padded.refilled_resnet110,
        resnet_branches.resnet32_gl,
        resnet_branches.resnet110_gl,
        resnet_branches.wide_resnet20_8_gl,
        mobilenet_v1.mobilenet_v1,
        mobilenet_v1.mobilenet_v1_x0_75,
        mobilenet_v1.mobilenet_v1_x0_5,
        mobilenet_v1.mobilenet_v1_x0_25,
        imagenet_resnet.imagenet_resnet18,
        imagenet_resnet.imagenet_resnet34,
        imagenet_resnet.imagenet_resnet50,
        imagenet_resnet.imagenet_resnet101,
        imagenet_resnet.imagenet_resnet152,
        imagenet_resnet.imagenet_resnet10x2,
        imagenet_resnet.imagenet_resnet18x2,
        imagenet_resnet.imagenet_resnet26x2,
        imagenet_resnet.imagenet_resnet34x2,
        imagenet_resnet.imagenet_resnet34x4,
        imagenet_resnet.imagenet_resnext50_32x4d,
        imagenet_resnet.imagenet_resnext101_32x8d,
        imagenet_resnet.imagenet_wide_resnet50_2,
        imagenet_resnet.imagenet_wide_resnet101_2,
        imagenet_resnet.mdistiller_resnet18,
        imagenet_resnet.mdistiller_resnet34,
        imagenet_resnet.mdistiller_resnet50,
        imagenet_resnet.mdistiller_resnet101,
        imagenet_resnet.mdistiller_resnet152,
        imagenet_mobilenet_v2.imagenet_mobilenet_v2,
        imagenet_shufflenet_v2.imagenet_shufflenet_v2_x0_5,
        imagenet_shufflenet_v2.imagenet_shufflenet_v2_x1_0,
        imagenet_shufflenet_v2.imagenet_shufflenet_v2_x1_5,
        imagenet_shufflenet_v2.imagenet_shufflenet_v2_x2_0,
    )
}


def build(name: str, num_classes: int, image_size: int = 32) -> Net:
    """A freshly initialised network; its weights come from the global random generator.

    `image_size`: of the data; some networks from elsewhere are made for one size.
    """
    return NETWORKS[name](num_classes) if name in NETWORKS else external.build(name, num_classes, image_size)


def check(name: str) -> None:
    """Refuses, in one line, a name that no network has."""
    if name in NETWORKS:
        return None
    if external.is_external(name):
        return external.check(name)
    close = get_close_matches(name, list(NETWORKS), 1, 0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(NETWORKS)}"
    raise UserError(f"there is no {name!r}; {hint}, or torchvision/NAME, timm/NAME, package.module:function, file.py:function")


def published_key(name: str) -> Callable[[str], str]:
    """A network's map from the keys of its authors' checkpoints to ours; it stands in the family's file."""
    return sys.modules[NETWORKS[name].__module__].published_key
