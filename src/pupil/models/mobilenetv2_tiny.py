"""MobileNetV2 as mdistiller has it for Tiny-ImageNet: Sandler et al., CVPR 2018, arXiv:1801.04381.

`MobileNetV2_tiny` is mdistiller's "MobileNetV2" of the Tiny-ImageNet configurations, width 1.0: ReLU6, biases in all
convolutions, a padded 1x1 stem (64 pixels become 66), strides 1, 2, 2, 2, 1, 1, 1.  Its last map is the 1280 channels that are
pooled.  The authors' classifier is a 1x1 convolution, here the same weights in a linear layer.
"""

import re

from torch import nn

from pupil.models.mobilenetv2 import GROUPS, group
from pupil.net import Net, Stage

STRIDES = (1, 2, 2, 2, 1, 1, 1)
STAGES = ((0, 1), (2,), (3,), (4, 5, 6))  # groups of each stage


def MobileNetV2_tiny(num_classes: int) -> Net:
    widths = [32, *(channels for _, channels, _, _ in GROUPS)]
    groups = [
        group(c_in, c_out, blocks, stride, expansion, nn.ReLU6, bias=True)
        for c_in, stride, (expansion, c_out, blocks, _) in zip(widths, STRIDES, GROUPS, strict=False)
    ]
    stem = nn.Sequential(nn.Conv2d(3, 32, 1, padding=1), nn.BatchNorm2d(32), nn.ReLU6())
    stages = [Stage(*(groups[g] for g in stage), act=nn.Identity()) for stage in STAGES[:-1]]
    conv = nn.Sequential(nn.Conv2d(320, 1280, 1), nn.BatchNorm2d(1280))
    stages.append(Stage(*(groups[g] for g in STAGES[-1]), conv, act=nn.ReLU6()))
    return Net(stem, stages, nn.Linear(1280, num_classes))


def published_key(key: str) -> str:
    """The key of a tensor in the authors' checkpoints -> ours; a classifier's weight is (K, 1280, 1, 1) there."""
    key = re.sub(r"^pre\.", "stem.", key)
    key = re.sub(r"^(stage[17])\.residual\.", r"\1.0.residual.", key)  # one block, not in a list
    key = re.sub(r"^stage(\d)\.(\d)\.residual\.", lambda m: f"{place(int(m[1]) - 1)}{m[2]}.conv.", key)
    key = re.sub(r"^conv1\.", f"stages.3.blocks.{len(STAGES[-1])}.", key)
    return re.sub(r"^conv2\.", "head.", key)


def place(g: int) -> str:
    """Where the group of this number is."""
    stage = next(i for i, groups in enumerate(STAGES) if g in groups)
    return f"stages.{stage}.blocks.{STAGES[stage].index(g)}."
