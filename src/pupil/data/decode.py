"""Image files -> a pool: decoded with all cores when they are asked for."""

import hashlib
import io
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pupil.data.base import Data, Images, Pool, Tick
from pupil.data.encoded import portable
from pupil.data.resized import centred
from pupil.data.tree import Tree, opener

BLOCK = 64  # images per task of the thread pool

Key = TypeVar("Key")  # what a file is asked for by
Fetch = Callable[[Key], bytes]  # for any thread


class Decoded(NamedTuple):
    pixels: np.ndarray  # (3, S, S) uint8
    size: tuple[int, int]  # as it was: width, height, upright
    mark: bytes  # hash of the pixels as they were
    file: bytes  # as pupil.data.encoded keeps it


def as_pool(tree: Tree, files: list[str], labels: Tensor, config: Data) -> Pool:
    """`files` of the tree and the class of each, (N,) int64."""
    return pool_of_files(partial(opener, tree), files, files, labels, config)


def pool_of_files(
    opener: Callable[[], Fetch[Key]], keys: Sequence[Key], names: Sequence[str], labels: Tensor, config: Data
) -> Pool:
    """Files that `opener()` gives the bytes of, by their keys."""
    return Pool(labels, partial(read, opener, keys, config.image_size, config.crop == "resized"), names)


def read(opener: Callable[[], Fetch[Key]], keys: Sequence[Key], size: int, resized: bool, ids: Tensor, tick: Tick) -> Images:
    """Decode the files at these positions."""
    pixels = torch.zeros(len(ids), 3, size, size, dtype=torch.uint8)
    sizes = torch.zeros(len(ids), 2, dtype=torch.int64)
    target, shapes, wanted = pixels.numpy(), sizes.numpy(), [keys[i] for i in ids.tolist()]
    marks: list[bytes] = []
    encoded: list[bytes] = []
    unreadable: dict[int, str] = {}
    with ExitStack() as stack:
        # The filter is the process's own: threads cannot have theirs.  Pillow only warns of the smaller bombs.
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        fetch = opener()
        workers = stack.enter_context(ThreadPoolExecutor())
        spans = [slice(i, i + BLOCK) for i in range(0, len(wanted), BLOCK)]
        jobs = (partial(decode_block, fetch, wanted[span], target[span], shapes[span], resized) for span in spans)
        try:
            for found, failures, raw in workers.map(lambda job: job(), jobs):
                unreadable |= {len(marks) + i: reason for i, reason in failures.items()}
                marks += found
                encoded += raw
                tick(len(found))
        finally:
            workers.shutdown(cancel_futures=True)
    return Images(pixels, sizes, marks, unreadable, encoded)


def decode_block(
    fetch: Fetch[Key], keys: list[Key], target: np.ndarray, sizes: np.ndarray, resized: bool
) -> tuple[list[bytes], dict[int, str], list[bytes]]:
    """Fill target (n, 3, S, S) and sizes (n, 2); the hashes, what was wrong with some files, and if resized the files."""
    marks, failures, files = [], {}, []
    for i, key in enumerate(keys):
        mark = file = b""
        try:
            target[i], sizes[i], mark, file = decode(fetch(key), target.shape[-1], resized)
        except UnidentifiedImageError:
            failures[i] = "not an image"
        except FileNotFoundError:
            failures[i] = "not there"
        except Exception as error:  # Pillow and zipfile raise a dozen types for damaged files; each is told to the user
            failures[i] = " ".join(str(error).split()) or type(error).__name__
        marks.append(mark)
        files += [file] * resized
    return marks, failures, files


def decode(raw: bytes, size: int, resized: bool = False) -> Decoded:
    """Upright, RGB, the centre square resized (bilinear, antialiased), or as `centred`.  Of an animation the first image."""
    with Image.open(io.BytesIO(raw)) as image:
        rgb = as_rgb(ImageOps.exif_transpose(image))
        file = portable(raw, image, rgb) if resized else b""
    side = min(rgb.size)
    left, top = (rgb.width - side) / 2, (rgb.height - side) / 2
    box = (left, top, left + side, top + side)
    small = centred(rgb, size) if resized else rgb.resize((size, size), Image.Resampling.BILINEAR, box=box)
    mark = hashlib.sha256(f"{rgb.width} x {rgb.height} ".encode())  # with the processor's help faster than blake2b
    mark.update(rgb.tobytes())
    return Decoded(np.asarray(small).transpose(2, 0, 1), rgb.size, mark.digest(), file)


def as_rgb(image: Image.Image) -> Image.Image:
    """Transparency is dropped, as torchvision's ImageFolder does; of 16 bits the upper 8 are kept (Pillow would clip)."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no known range; convert to 8 or 16 bits")
    return image.convert("RGB")
