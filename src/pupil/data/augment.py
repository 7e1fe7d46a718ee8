"""What is drawn at random for an image: a function of seed, epoch, the image's id and nothing else.

Each number is a hash of these and of its place among the numbers of one image (a counter-based generator: SplitMix64's
finaliser, Steele, Lea, Flood, OOPSLA 2014), computed in integers: the same on every device, in any order, batch or shard.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # int64 wraps around as uint64 does
FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
SECOND = 0x94D049BB133111EB - (1 << 64)
ORDER, VIEW, STRONG, OPERATING = range(4)  # streams of one seed and epoch that do not depend on each other


class Augment(NamedTuple):
    """A random crop, then a horizontal flip with probability one half."""

    pad: int = 0  # pixels of zeros around the image that is cropped
    flip: bool = False
    crop: str = "pad"  # or resized: of the encoded image, by pupil.data.resized
    scale: tuple[float, ...] = (0.08, 1.0)  # resized: share of the image's area, from, to
    ratio: tuple[float, ...] = (3 / 4, 4 / 3)  # resized: width / height, from, to


class Moves(NamedTuple):
    """What is done to each of B images."""

    corners: Tensor  # (B, 2) int64, row and column of the crop in the padded image
    flips: Tensor  # (B,) bool


def bits(seed: int, epoch: int, ids: Tensor, count: int, stream: int) -> Tensor:
    """ids (B,) int64 -> (B, count) int64, every bit of them random."""
    place = torch.arange(1, count + 1, device=ids.device)
    state = torch.zeros((), dtype=torch.int64)
    for part in torch.tensor([seed, stream, epoch]):
        state = mix(state + (part + 1) * GOLDEN)
    return mix(mix(state.to(ids.device) + (ids[:, None] + 1) * GOLDEN) + place * GOLDEN)


def mix(x: Tensor) -> Tensor:
    x = (x ^ shifted(x, 30)) * FIRST
    x = (x ^ shifted(x, 27)) * SECOND
    return x ^ shifted(x, 31)


def shifted(x: Tensor, by: int) -> Tensor:
    """To the right, with zeros coming in; torch repeats the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def uniform(seed: int, epoch: int, ids: Tensor, count: int, stream: int) -> Tensor:
    """ids (B,) int64 -> (B, count) float64 in [0, 1), multiples of 2^-53."""
    return shifted(bits(seed, epoch, ids, count, stream), 11).double() * 2.0**-53


def view_of(epoch: int, views: int | None) -> int:
    """The epoch whose draws are shown: where there are so many `views`, one of 1 to `views`, by turns."""
    return epoch if views is None else (epoch - 1) % views + 1


def order(seed: int, epoch: int, samples: int) -> Tensor:
    """(samples,) int64, a permutation."""
    return bits(seed, epoch, torch.arange(samples), 1, ORDER)[:, 0].argsort(stable=True)


def moves(augment: Augment, seed: int | None, epoch: int, ids: Tensor, stream: int = VIEW) -> Moves:
    """Without a seed nothing is moved: the middle of the padded image is the image."""
    if seed is None:
        still = torch.full((len(ids), 2), augment.pad, device=ids.device)
        return Moves(still, torch.zeros(len(ids), dtype=torch.bool, device=ids.device))
    u = uniform(seed, epoch, ids, 3, stream)
    return Moves((u[:, :2] * (2 * augment.pad + 1)).long(), (u[:, 2] < 0.5) & augment.flip)


def move(images: Tensor, how: Moves, pad: int) -> Tensor:
    """(B, C, H, W) -> the same, cropped and flipped."""
    images = crop(images, how.corners, pad) if pad else images
    return torch.where(how.flips.view(-1, 1, 1, 1), images.flip(3), images)


def crop(images: Tensor, corners: Tensor, pad: int) -> Tensor:
    """Zero-pads (B, C, H, W) and cuts each image to its size again at its own corner (B, 2)."""
    b, _, h, w = images.shape
    padded = F.pad(images, (pad, pad, pad, pad))
    rows = corners[:, 0, None] + torch.arange(h, device=images.device)  # (B, H)
    cols = corners[:, 1, None] + torch.arange(w, device=images.device)  # (B, W)
    batch = torch.arange(b, device=images.device)
    return padded.permute(0, 2, 3, 1)[batch[:, None, None], rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
