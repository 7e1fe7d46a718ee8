"""MobileNetV1: Howard et al., 2017, arXiv:1704.04861, at four widths; mdistiller's ImageNet student and REFILLED's students.

A stage ends where the next block halves the map; the stem and the first block have no map of their own beside `stem`.
Initialisation: torch's own, as in both.  Deviation: the pool adapts to any input size.
"""

import re

from torch import nn

from pupil.net import Net, Stage

STAGES = (  # (width, stride) of each block
    ((64, 1), (128, 2), (128, 1)),
    ((256, 2), (256, 1)),
    ((512, 2), *((512, 1),) * 5),
    ((1024, 2), (1024, 1)),
)


def mobilenet(width: float, num_classes: int) -> Net:
    """`width` scales every number of channels."""
    c = int(32 * width)
    stem = nn.Sequential(nn.Conv2d(3, c, 3, 2, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU())
    stages = []
    for blocks in STAGES:
        layers: list[nn.Module] = []
        for i, (base, stride) in enumerate(blocks):
            layers.append(separable(c, int(base * width), stride, last=i == len(blocks) - 1))
            c = int(base * width)
        stages.append(Stage(*layers, act=nn.ReLU()))
    return Net(stem, stages, nn.Linear(c, num_classes))


def separable(c_in: int, c_out: int, stride: int, last: bool) -> nn.Sequential:
    """A 3x3 convolution by channel and a 1x1; the last block of a stage leaves its ReLU to the stage."""
    layers = (
        nn.Conv2d(c_in, c_in, 3, stride, 1, groups=c_in, bias=False),
        nn.BatchNorm2d(c_in),
        nn.ReLU(inplace=True),
        nn.Conv2d(c_in, c_out, 1, bias=False),
        nn.BatchNorm2d(c_out),
    )
    return nn.Sequential(*layers) if last else nn.Sequential(*layers, nn.ReLU(inplace=True))


def published_key(key: str) -> str:
    """The key of a tensor in the authors' checkpoints (mdistiller: `model`; REFILLED: `layers`) -> ours."""
    places = [f"stages.{s}.blocks.{b}." for s, blocks in enumerate(STAGES) for b in range(len(blocks))]
    key = re.sub(r"^(model\.0\.0|conv1)\.", "stem.0.", key)
    key = re.sub(r"^(model\.0\.1|bn1)\.", "stem.1.", key)
    key = re.sub(r"^model\.(\d+)\.", lambda m: places[int(m[1]) - 1], key)
    slots = {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4}
    key = re.sub(r"^layers\.(\d+)\.(\w+)\.", lambda m: f"{places[int(m[1])]}{slots[m[2]]}.", key)
    return re.sub(r"^fc\.", "head.", key)


def mobilenet_v1(num_classes: int) -> Net:
    return mobilenet(1.0, num_classes)


def mobilenet_v1_x0_75(num_classes: int) -> Net:
    return mobilenet(0.75, num_classes)


def mobilenet_v1_x0_5(num_classes: int) -> Net:
    return mobilenet(0.5, num_classes)


def mobilenet_v1_x0_25(num_classes: int) -> Net:
    return mobilenet(0.25, num_classes)
