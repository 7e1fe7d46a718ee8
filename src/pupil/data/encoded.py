"""The images of a split as encoded files (JPEG or PNG), one after the other in one file: where crops are resized, pixels of
one size would not do.

Beside what every split has (pupil.data.files) there are ends (N,) int64, the byte behind each image, and sizes (N, 2) int64,
width and height.  All are upright and RGB or grey: whatever else there was is a PNG of the same pixels.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pupil.data.resized import centred


class Encoded(NamedTuple):
    """Read when asked for."""

    path: Path
    start: int  # first byte
    ends: Tensor  # (N,) int64, from there
    sizes: Tensor  # (N, 2) int64, width and height
    side: int  # S, pixels of what networks see

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.ends), 3, self.side, self.side)

    def files(self, ids: Sequence[int]) -> list[bytes]:
        """The encoded images at these positions."""
        found = []
        with open(self.path, "rb", 0) as file:
            for i in ids:
                begin, end = int(self.ends[i - 1]) if i else 0, int(self.ends[i])
                found.append(os.pread(file.fileno(), end - begin, self.start + begin))
                if len(found[-1]) != end - begin:
                    raise OSError(f"{self.path} is shorter than it was")
        return found

    def read(self, ids: Tensor) -> Tensor:
        """Positions (n,) -> (n, 3, S, S) uint8, as they are evaluated."""
        return torch.stack([as_tensor(centred(opened(raw), self.side)) for raw in self.files(ids.tolist())])

    @property
    def bytes(self) -> int:
        return int(self.ends[-1])


class Shown:
    """A sequence of images (3, S, S) uint8, as they are evaluated."""

    def __init__(self, files: Encoded) -> None:
        self.files = files

    def __getitem__(self, i: int) -> Tensor:
        return self.files.read(torch.tensor([i]))[0]


def opened(raw: bytes) -> Image.Image:
    with Image.open(io.BytesIO(raw)) as image:
        return image.convert("RGB")


def as_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def portable(raw: bytes, image: Image.Image, upright: Image.Image) -> bytes:
    """The file itself if every decoder shows `upright` (RGB) for it, else a PNG of that."""
    plain = image.format in ("JPEG", "PNG") and image.mode in ("RGB", "L") and "transparency" not in image.info
    if plain and getattr(image, "n_frames", 1) == 1 and image.getexif().get(0x0112, 1) == 1:
        return raw
    written = io.BytesIO()
    upright.save(written, "PNG", compress_level=1)
    return written.getvalue()
