"""MLKD's strong view: two random operations of fourteen, then a square cut out.

Source: Jin et al., CVPR 2023; Cubuk et al., 2020, arXiv:1909.13719.  Their variant of RandAugment: the strength of an
operation is uniform over its range, with both signs where it has a direction, and Cutout follows.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pupil.data.augment import OPERATING, uniform

GREY = (125, 123, 114)  # what is cut out


def torchvision(name: str) -> Callable[..., Tensor]:
    """A function of torchvision, which is imported when a strong view is first made."""
    from torchvision.transforms import functional

    return getattr(functional, name)


OPERATIONS: dict[str, tuple[float, float, Callable[[Tensor, float], Tensor]]] = {  # least, greatest, (3, H, W) uint8 -> same
    "autocontrast": (0, 1, lambda x, v: torchvision("autocontrast")(x)),
    "brightness": (0.05, 0.95, lambda x, v: torchvision("adjust_brightness")(x, v)),
    "color": (0.05, 0.95, lambda x, v: torchvision("adjust_saturation")(x, v)),
    "contrast": (0.05, 0.95, lambda x, v: torchvision("adjust_contrast")(x, v)),
    "equalize": (0, 1, lambda x, v: torchvision("equalize")(x)),
    "identity": (0, 1, lambda x, v: x),
    "posterize": (4, 8, lambda x, v: torchvision("posterize")(x, int(v))),
    "rotate": (-30, 30, lambda x, v: torchvision("rotate")(x, v)),
    "sharpness": (0.05, 0.95, lambda x, v: torchvision("adjust_sharpness")(x, v)),
    "shear_x": (-0.3, 0.3, lambda x, v: affine(x, shear=[degrees(v), 0.0])),
    "shear_y": (-0.3, 0.3, lambda x, v: affine(x, shear=[0.0, degrees(v)])),
    "solarize": (0, 256, lambda x, v: torch.where(x < v, x, 255 - x)),
    "translate_x": (-0.3, 0.3, lambda x, v: affine(x, translate=[round(v * x.shape[2]), 0])),
    "translate_y": (-0.3, 0.3, lambda x, v: affine(x, translate=[0, round(v * x.shape[1])])),
}


class Draws(NamedTuple):
    """What is done to each of N samples."""

    operations: Tensor  # (N, 2) int64, positions in OPERATIONS
    strengths: Tensor  # (N, 2) in 0..1, from the least to the greatest
    holes: Tensor  # (N, 3) in 0..1: side of the square (of half the width), its centre


def draw(seed: int, epoch: int, ids: Tensor) -> Draws:
    """ids (N,) int64; on their device."""
    operations, strengths, holes = uniform(seed, epoch, ids, 7, OPERATING).split((2, 2, 3), 1)
    return Draws((operations * len(OPERATIONS)).long(), strengths, holes)


def strengthen(images: Tensor, draws: Draws) -> Tensor:
    """(B, 3, H, W) uint8 -> the same, each by its own draws (on the CPU)."""
    table = list(OPERATIONS.values())
    out = []
    plan = zip(images, draws.operations.tolist(), draws.strengths.tolist(), draws.holes.tolist(), strict=True)
    for image, operations, strengths, hole in plan:
        for index, strength in zip(operations, strengths, strict=True):
            least, greatest, apply = table[index]
            image = apply(image, least + strength * (greatest - least))
        out.append(cut_out(image, *hole))
    return torch.stack(out)


def cut_out(image: Tensor, size: float, x: float, y: float) -> Tensor:
    """A square of up to half the width, clipped at the border, becomes grey."""
    _, h, w = image.shape
    side = size * w / 2
    left, top = int(max(0.0, x * w - side / 2)), int(max(0.0, y * h - side / 2))
    image = image.clone()
    image[:, top : int(top + side) + 1, left : int(left + side) + 1] = torch.tensor(
        GREY, dtype=image.dtype, device=image.device
    ).view(3, 1, 1)
    return image


def affine(image: Tensor, translate: list[int] | None = None, shear: list[float] | None = None) -> Tensor:
    return torchvision("affine")(image, 0.0, translate or [0, 0], 1.0, shear or [0.0, 0.0], center=[0, 0])


def degrees(slope: float) -> float:
    return math.degrees(math.atan(slope))
