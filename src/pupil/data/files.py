"""A split on disk: one safetensors file, written block by block and read by position, never as a whole.

labels and source_ids stand before the images, whose number is known only when all are read: the header is padded with
spaces, which the format allows, and takes up the room of those that were dropped.  The images are pixels of one size, or
encoded files (pupil.data.encoded).
"""

import hashlib
import itertools
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pupil.data.base import Images
from pupil.data.encoded import Encoded, Shown
from pupil.facts import MOST_PIXELS
from pupil.jsonfile import parse

NAMES = ("images", "labels", "source_ids")  # in the order of the hash
ROOM = 1024  # bytes for the header
MOST = 100_000_000  # bytes of a header that are read, as safetensors itself
BLOCK = 1 << 24  # bytes hashed at once
Buffer: TypeAlias = bytes | memoryview


class Pixels(NamedTuple):
    """The images of a split where they lie on disk: read when asked for, with no more memory than was asked for."""

    path: Path
    start: int  # first byte
    shape: tuple[int, ...]  # N, 3, S, S

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape))

    def read(self, ids: Tensor, pinned: bool = False) -> Tensor:
        """Positions (n,) -> (n, 3, S, S) uint8."""
        found = torch.empty(len(ids), *self.shape[1:], dtype=torch.uint8, pin_memory=pinned)
        size, target = self.bytes // self.shape[0], found.numpy()
        with open(self.path, "rb", 0) as file:
            for i, image in zip(ids.tolist(), target, strict=True):
                if os.preadv(file.fileno(), [image.data], self.start + i * size) != size:
                    raise OSError(f"{self.path} is shorter than it was")
        return found

    def mapped(self) -> Tensor:
        """All of it, (N, 3, S, S) uint8, not to be written to: a page comes to memory when it is touched."""
        return mapped(self.path, self.start, "u1", self.shape)


class Split(NamedTuple):
    pixels: Pixels | Encoded
    labels: Tensor  # (N,) int64
    source_ids: Tensor  # (N,) int64

    @property
    def images(self) -> Tensor | Shown:
        """Encoded images are decoded one by one, when they are asked for."""
        return self.pixels.mapped() if isinstance(self.pixels, Pixels) else Shown(self.pixels)


class Writer:
    """Writes the images as they come."""

    each = 16  # bytes beside an image

    def __init__(self, path: Path, most: int, size: int) -> None:
        """`most`: as many images as may come, of `size` x `size` pixels."""
        self.path, self.size, self.start = path, size, ROOM + self.each * most
        self.count, self.length, self.digest = 0, 0, hashlib.sha256()
        path.touch()

    def add(self, images: Images, wanted: Tensor) -> None:
        """Those of them that are `wanted` (n,) bool."""
        self.append((images.pixels if wanted.all() else images.pixels[wanted]).flatten().numpy().data)
        self.count += int(wanted.sum())

    def append(self, raw: Buffer) -> None:
        self.write(self.start + self.length, raw)
        self.digest.update(raw)
        self.length += len(raw)

    def write(self, start: int, raw: Buffer) -> None:
        with open(self.path, "r+b") as file:
            file.seek(start)
            file.write(raw)

    @property
    def shape(self) -> list[int]:
        return [self.count, 3, self.size, self.size]

    def beside(self) -> dict[str, Tensor]:
        """What more there is of each image, int64."""
        return {}

    def finish(self, labels: Tensor, source_ids: Tensor) -> str:
        """SHA-256 of the bytes of images, labels, ids, and what is beside them."""
        arrays = {"labels": labels, "source_ids": source_ids, **self.beside()}
        assert {len(part) for part in arrays.values()} == {self.count}, "one of each for each image"
        assert self.count <= (self.start - ROOM) // self.each
        raw = [part.numpy().tobytes() for part in arrays.values()]
        ends = np.cumsum([0, *map(len, raw)]).tolist()
        header: dict[str, Any] = {"__metadata__": {"image_size": str(self.size)}}
        for (name, part), place in zip(arrays.items(), itertools.pairwise(ends), strict=True):
            header[name] = {"dtype": "I64", "shape": list(part.shape), "data_offsets": list(place)}
        header["images"] = {"dtype": "U8", "shape": self.shape, "data_offsets": [ends[-1], ends[-1] + self.length]}
        few = self.start - ends[-1]
        text = json.dumps(header).encode()
        assert len(text) <= ROOM - 8
        self.write(0, (few - 8).to_bytes(8, "little") + text.ljust(few - 8) + b"".join(raw))
        for part in raw:
            self.digest.update(part)
        return self.digest.hexdigest()


class FileWriter(Writer):
    """Writes them as encoded files."""

    each = 40

    def __init__(self, path: Path, most: int, size: int) -> None:
        super().__init__(path, most, size)
        self.ends: list[int] = []
        self.sizes: list[Tensor] = []

    def add(self, images: Images, wanted: Tensor) -> None:
        for i in wanted.nonzero().flatten().tolist():
            self.append(images.files[i])
            self.ends.append(self.length)
            self.sizes.append(images.sizes[i])
        self.count = len(self.ends)

    @property
    def shape(self) -> list[int]:
        return [self.length]

    def beside(self) -> dict[str, Tensor]:
        return {"ends": torch.tensor(self.ends), "sizes": torch.stack(self.sizes)} if self.ends else {}


def open_split(path: Path) -> Split:
    """ValueError where the file is not whole."""
    places, size = locate(path)
    arrays = {name: mapped(path, places[name][0], "<i8", places[name][1]).clone() for name in places if name != "images"}
    start, shape = places["images"]
    pixels = Encoded(path, start, arrays["ends"], arrays["sizes"], size) if "ends" in arrays else Pixels(path, start, shape)
    return Split(pixels, arrays["labels"], arrays["source_ids"])


def locate(path: Path) -> tuple[dict[str, tuple[int, tuple[int, ...]]], int]:
    """Of each array the first byte and the shape, the images first; and the side of an image in pixels."""
    with open(path, "rb") as file:
        size, length = path.stat().st_size, int.from_bytes(file.read(8), "little")
        if length > MOST:
            raise ValueError(f"{path.name} has a header of {length} bytes, more than {MOST}")
        header = parse(file.read(length).decode()) if length < size else {}
    try:
        names = dict.fromkeys([*NAMES, *header])
        del names["__metadata__"]
        found = {name: (8 + length + header[name]["data_offsets"][0], tuple(header[name]["shape"])) for name in names}
        end = max(header[name]["data_offsets"][1] for name in names)
        side = int(header["__metadata__"]["image_size"])
        if not 0 < side <= MOST_PIXELS or not all(agrees(length, size, **header[name]) for name in names):
            raise TypeError
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise ValueError(f"{path.name} is no file of images, labels and source_ids") from error
    if size != 8 + length + end:
        raise ValueError(f"{path.name} has {size} bytes, {8 + length + end} are needed")
    return found, side


def agrees(length: int, size: int, dtype: str, shape: list[int], data_offsets: list[int]) -> bool:
    """Whether an array lies within the file and is as large as its shape."""
    start, end = data_offsets
    whole = all(type(n) is int and n >= 0 for n in (*shape, start, end))
    return whole and 8 + length + end <= size and end - start == math.prod(shape) * {"U8": 1, "I64": 8}[dtype]


def sha256(path: Path) -> str:
    """What `Writer.finish` gave, of the file as it is now."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for name, (start, shape) in locate(path)[0].items():
            file.seek(start)
            left = int(np.prod(shape)) * (1 if name == "images" else 8)
            while left and (block := file.read(min(left, BLOCK))):
                digest.update(block)
                left -= len(block)
    return digest.hexdigest()


def mapped(path: Path, start: int, kind: str, shape: tuple[int, ...]) -> Tensor:
    """Read-only and shared: such a mapping counts against no limit of memory, whatever its size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch cannot mark a tensor as read-only and says so
        return torch.from_numpy(np.memmap(path, kind, "r", start, shape))
