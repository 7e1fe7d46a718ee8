"""The settings of a data set, and what a source offers before anything is drawn from it."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pupil.data.augment import Augment

Tick = Callable[[int], None]  # called with the number of images read since the last call


@dataclass(frozen=True)
class Data:
    """The `data:` section of params.yaml."""

    name: str = "digits"  # a row of SOURCES
    path: str | None = None  # where the images are: a folder, .zip, .tar.gz, shards; where downloads go (None: "downloads")
    test_path: str | None = None  # folder, shards: the test images, where they are in a place of their own
    image_size: int = 32  # pixels, square
    train_images: int | None = None  # None: all that is left; else a stratified draw (from the teachers' classes as well)
    per_class: int | None = None  # so many training images of each class, instead of train_images
    val_images: int | None = None  # taken from the training data, stratified; None: 10 % of it
    test_images: int | None = None  # None: all; without a test split: 20 % held out (digits: all but train and val)
    folds: int | None = None  # cut the training data into so many stratified parts; instead of val_images
    fold: int | None = None  # which of them is the validation split, 0..
    classes: int | tuple[int | str, ...] | None = (
        None  # None: all; indices or names, labels become 0.. in this order; n: CSKD's
    )
    relabel: str = "right"  # right | cskd: as CSKD's code renumbers CIFAR and CUB, which merges some of `classes`
    teacher_classes: int | str | tuple[int | str, ...] | None = None  # None: those of `classes`; "all"; else like `classes`
    overlap: float | None = None  # instead of both: teachers learn the first half of the classes, students the second, with
    # this share of it replaced by the teachers' classes
    unreadable: str = "stop"  # stop | drop: what to do about images that cannot be read
    crop: str | None = None  # pad | resized (random resized crops; image files alone); None: the source's own recipe
    pad: int | None = None  # random crop after this zero padding, pixels; None: the source's own recipe
    scale: tuple[float, ...] | None = (
        None  # of random resized crops: share of the image's area, from, to; None: the source's own
    )
    ratio: tuple[float, ...] | None = None  # of random resized crops: width / height, from, to; None: the source's own
    flip: bool | None = None  # random horizontal flip; None: the source's own recipe
    seed: int = 0  # of every draw above


class Images(NamedTuple):
    pixels: Tensor  # (n, 3, S, S) uint8
    sizes: Tensor  # (n, 2) int64, width and height as they were
    marks: list[bytes]  # hash of the pixels as they were
    unreadable: dict[int, str]  # position among the n -> reason; pixels and size are zero, the mark is empty
    files: Sequence[bytes] = ()  # resized: each image encoded, for pupil.data.encoded; else none


class Pool(NamedTuple):
    """One split of a source; images are read when asked for."""

    labels: Tensor  # (N,) int64, index of the source's class
    read: Callable[[Tensor, Tick], Images]  # positions (n,) -> images
    names: Sequence[str] | None = None  # the files' names; None: they have none


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
        marks: list[bytes] = []
        for block, target in zip(ids.split(1024), done.split(1024), strict=True):
            images = pixels[block]
            marks += [hashlib.sha256(image.tobytes()).digest() for image in images.numpy()]
            if images.shape[-1] != size:
                shrinks = size < images.shape[-1]
                images = F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=shrinks).round()
            target.copy_(images)
            tick(len(block))
        sizes = torch.tensor([pixels.shape[-1], pixels.shape[-2]]).expand(len(ids), 2)
        return Images(done, sizes, marks, {})

    return Pool(labels, read)
