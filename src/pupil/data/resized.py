"""Random resized crops for training, and the evaluation that goes with them: the shorter side resized, the centre cut out.

Both are torchvision's, to the bit (RandomResizedCrop, by default with its default scale and ratio; Resize 256, CenterCrop 224,
and the same proportion at other sizes), but that the numbers drawn are those of pupil.data.augment.
"""

import math
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from pupil.data.augment import VIEW, Augment, uniform

TRIES = 10


class Cuts(NamedTuple):
    """What is done to each of B images."""

    windows: Tensor  # (B, 4) int64: top, left, height, width, in pixels of the whole image
    flips: Tensor  # (B,) bool


def cuts(sizes: Tensor, augment: Augment, seed: int, epoch: int, ids: Tensor, stream: int = VIEW) -> Cuts:
    """sizes (B, 2) int64: width and height of the images `ids` (B,); on the CPU."""
    u = uniform(seed, epoch, ids, 2 * TRIES + 3, stream)
    (least, most), (narrow, wide) = augment.scale, augment.ratio
    w, h = sizes.double().T[:, :, None]
    area = w * h * (least + (most - least) * u[:, :TRIES])
    low, high = math.log(narrow), math.log(wide)
    aspect = (low + (high - low) * u[:, TRIES : 2 * TRIES]).exp()
    width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (width > 0) & (width <= w) & (height > 0) & (height <= h)
    first = fits.long().argmax(1, keepdim=True)  # the first try that fits
    found = fits.any(1)
    w, h = w[:, 0], h[:, 0]
    width = torch.where(found, width.gather(1, first)[:, 0], torch.minimum(w, (h * wide).round()))
    height = torch.where(found, height.gather(1, first)[:, 0], torch.minimum(h, (w / narrow).round()))
    top, left = (u[:, -3:-1].T * torch.stack([h - height + 1, w - width + 1])).floor()
    top, left = torch.where(found, top, ((h - height) / 2).floor()), torch.where(found, left, ((w - width) / 2).floor())
    return Cuts(torch.stack([top, left, height, width], 1).long(), (u[:, -1] < 0.5) & augment.flip)


def cut(image: Image.Image, window: list[int], flip: bool, size: int) -> Image.Image:
    """The window, resized to the square (bilinear, antialiased), and flipped if so drawn."""
    top, left, height, width = window
    small = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)
    return small.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else small


def shorter(size: int) -> int:
    """Pixels of the shorter side before the centre is cut out: 256 for 224."""
    return round(size * 256 / 224)


def centred(image: Image.Image, size: int) -> Image.Image:
    """As images are evaluated."""
    (w, h), (top, left) = resized_size(*image.size, size), offset(*image.size, size)
    return image.resize((w, h), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))


def resized_size(w: int, h: int, size: int) -> tuple[int, int]:
    short = shorter(size)
    return (short, int(short * h / w)) if w <= h else (int(short * w / h), short)


def offset(w: int, h: int, size: int) -> tuple[int, int]:
    """Top and left of the centre in the image once it is resized."""
    wide, high = resized_size(w, h, size)
    return round((high - size) / 2), round((wide - size) / 2)


def centre(w: int, h: int, size: int) -> tuple[float, float, float, float]:
    """Top, left, bottom, right of what `centred` keeps, in pixels of the whole image."""
    (wide, high), (top, left) = resized_size(w, h, size), offset(w, h, size)
    return top * h / high, left * w / wide, (top + size) * h / high, (left + size) * w / wide
