"""The settings of a data set, and what a source offers before anything is drawn from it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pupil.data.resident import Augment

Tick = Callable[[int], None]  # called with the number of images read since the last call


@dataclass(frozen=True)
class Data:
    """The `data:` section of params.yaml."""

    name: str = "digits"  # digits | cifar10 | cifar100 | folder
    path: str | None = None  # folder: a folder or .zip of class folders; cifar: where downloads are kept (None: "downloads")
    test_path: str | None = None  # folder: the test images, where they are a folder or .zip of their own
    image_size: int = 32  # pixels, square
    train_images: int | None = None  # None: all that is left; else a stratified draw
    val_images: int | None = None  # taken from the training data, stratified; None: 10 % of it
    test_images: int | None = None  # None: all; without a test split: 20 % held out (digits: all but train and val)
    classes: tuple[int | str, ...] | None = None  # None: all; else indices or names; labels become 0.. in this order
    pad: int | None = None  # random crop after this zero padding, pixels; None: the source's own recipe
    flip: bool | None = None  # random horizontal flip; None: the source's own recipe
    seed: int = 0  # of every draw above


class Images(NamedTuple):
    pixels: Tensor  # (n, 3, S, S) uint8
    unreadable: list[str]  # file and reason, one line each; their pixels are zero


class Pool(NamedTuple):
    """One split of a source; images are read when asked for."""

    labels: Tensor  # (N,) int64, index of the source's class
    read: Callable[[Tensor, Tick], Images]  # positions (n,) -> images


class Content(NamedTuple):
    """What a source holds for one setting of `Data`.  Missing splits are drawn from `train`."""

    classes: tuple[str, ...]
    train: Pool
    val: Pool | None = None
    test: Pool | None = None
    rest_is_test: bool = False  # where train_images is given, all that is neither train nor val is test
    fingerprint: str | None = None  # of the files' names and sizes (in a zip: checksums); None: the source never changes


class Source(NamedTuple):
    """A row of the table of data sets."""

    about: str
    classes: int | None  # None: as many as there are folders
    size: int | None  # native size in pixels; None: any
    augment: Augment
    load: Callable[[Data], Content]
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # published mean and std; None: measured


def in_memory(pixels: Tensor, labels: Tensor, size: int) -> Pool:
    """A pool over (N, 3, h, w) uint8 that is resized (bilinear, antialiased when it shrinks) as it is read."""

    def read(ids: Tensor, tick: Tick) -> Images:
        done = torch.empty(len(ids), 3, size, size, dtype=torch.uint8)
        for block, target in zip(ids.split(1024), done.split(1024), strict=True):
            images = pixels[block]
            if images.shape[-1] != size:
                shrinks = size < images.shape[-1]
                images = F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=shrinks).round()
            target.copy_(images)
            tick(len(block))
        return Images(done, [])

    return Pool(labels, read)
