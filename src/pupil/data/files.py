"""A split on disk: one safetensors file, written block by block and read by position, never as a whole.

labels and source_ids stand before the images, whose number is known only when all are read: the header is padded with
spaces, which the format allows, and takes up the room of those that were dropped.
"""

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

NAMES = ("images", "labels", "source_ids")  # in the order of the hash
ROOM = 512  # bytes for the header
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
    pixels: Pixels
    labels: Tensor  # (N,) int64
    source_ids: Tensor  # (N,) int64

    @property
    def images(self) -> Tensor:
        return self.pixels.mapped()


class Writer:
    """Writes the images as they come."""

    def __init__(self, path: Path, most: int, size: int) -> None:
        """`most`: as many images as may come, of `size` x `size` pixels."""
        self.path, self.size, self.start = path, size, ROOM + 16 * most
        self.count, self.digest = 0, hashlib.sha256()
        path.touch()

    def add(self, images: Tensor) -> None:
        """(n, 3, S, S) uint8."""
        raw = images.flatten().numpy().data
        self.write(self.start + self.count * 3 * self.size**2, raw)
        self.digest.update(raw)
        self.count += len(images)

    def write(self, start: int, raw: Buffer) -> None:
        with open(self.path, "r+b") as file:
            file.seek(start)
            file.write(raw)

    def finish(self, labels: Tensor, source_ids: Tensor) -> str:
        """SHA-256 of the bytes of images, labels and ids."""
        n, few = self.count, self.start - 16 * self.count
        assert len(labels) == len(source_ids) == n <= (self.start - ROOM) // 16, "one label and one id for each image"
        raw = [part.numpy().tobytes() for part in (labels, source_ids)]
        places = {
            "labels": ("I64", [n], [0, 8 * n]),
            "source_ids": ("I64", [n], [8 * n, 16 * n]),
            "images": ("U8", [n, 3, self.size, self.size], [16 * n, 16 * n + 3 * n * self.size**2]),
        }
        header = {name: dict(zip(("dtype", "shape", "data_offsets"), place, strict=True)) for name, place in places.items()}
        text = json.dumps(header).encode().ljust(few - 8)
        self.write(0, (few - 8).to_bytes(8, "little") + text + b"".join(raw))
        for part in raw:
            self.digest.update(part)
        return self.digest.hexdigest()


def open_split(path: Path) -> Split:
    """ValueError where the file is not whole."""
    places = locate(path)
    pixels = Pixels(path, *places["images"])
    return Split(pixels, *(mapped(path, start, "<i8", shape).clone() for start, shape in (places[n] for n in NAMES[1:])))


def locate(path: Path) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Of each array the first byte and the shape."""
    with open(path, "rb") as file:
        size, length = path.stat().st_size, int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length)) if length < size else {}
    try:
        found = {name: (8 + length + header[name]["data_offsets"][0], tuple(header[name]["shape"])) for name in NAMES}
        end = max(header[name]["data_offsets"][1] for name in NAMES)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path.name} is no file of images, labels and source_ids") from error
    if size != 8 + length + end:
        raise ValueError(f"{path.name} has {size} bytes, {8 + length + end} are needed")
    return found


def sha256(path: Path) -> str:
    """What `Writer.finish` gave, of the file as it is now."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for name, (start, shape) in locate(path).items():
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
