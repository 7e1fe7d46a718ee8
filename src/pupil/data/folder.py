"""Your own images: a folder or a .zip file with one folder per class, read in place.

Splits are folders `train` and `test` (or `val` where there is no `test`; with both, `val` is the validation split), or
`test_path`, or drawn.  A wrapping folder is skipped.  Classes are in the order of their names; files below a class count
at any depth; hidden files and files that are no images by their name are left out.
"""

import hashlib
import io
import os
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pupil.data.base import Content, Data, Images, Pool, Tick
from pupil.types import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif")
VAL_NAMES = {"valid": "val", "validation": "val"}
BLOCK = 64  # images per task of the thread pool


class Tree(NamedTuple):
    """The image files of a folder or zip file; names are relative to it, with slashes."""

    path: Path
    files: list[str]  # sorted
    folders: set[str]
    fingerprint: str  # SHA-256 of names with sizes, or with the checksums that a zip file holds


class Split(NamedTuple):
    tree: Tree
    prefix: str  # "", or the folder that holds the class folders, with a slash at its end


def folder(config: Data) -> Content:
    if config.path is None:
        raise UserError("data.path is not given: data.name=folder reads the images of a folder or .zip; set data.path to it")
    splits = find_splits(list_images("data.path", config.path))
    if config.test_path is not None:
        if "test" in splits:
            raise UserError(
                f"data.test_path is {config.test_path!r}, but {config.path} has test images of its own "
                f"({splits['test'].prefix}); leave one of them out"
            )
        tree = list_images("data.test_path", config.test_path)
        splits["test"] = Split(tree, skip_wrapping(tree))
    elif "test" not in splits and "val" in splits:
        splits["test"] = splits.pop("val")
    classes = class_folders(splits["train"])
    if len(classes) < 2:
        raise UserError(no_classes(splits["train"], classes))
    for name, split in splits.items():
        check_same_classes(name, classes, class_folders(split), split)
    pools = {name: as_pool(split, classes, config.image_size) for name, split in splits.items()}
    prints = " ".join(dict.fromkeys(split.tree.fingerprint for split in splits.values()))
    return Content(classes, pools["train"], pools.get("val"), pools.get("test"), fingerprint=prints)


def list_images(key: str, given: str) -> Tree:
    path = Path(given).expanduser()
    if path.is_dir():
        return as_tree(path, walk(path))
    if not path.exists():
        raise UserError(f"{key} is {given!r}: there is no such folder or .zip file; correct the path")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{key} is {given!r}: neither a folder nor a .zip file that can be read ({error})") from error
    if any(entry.flag_bits & 1 for entry in entries):
        raise UserError(f"{key} is {given!r}: the .zip file is encrypted; give one without a password")
    return as_tree(path, ((entry.filename, entry.CRC) for entry in entries))


def walk(path: Path) -> Iterable[tuple[str, int]]:
    """Every file and folder below, relative, with slashes, and its size; folders end with a slash."""
    for here, folders, files in os.walk(path, followlinks=True):
        inside = Path(here).relative_to(path)
        yield from (((inside / name).as_posix(), size_of(Path(here, name))) for name in files)
        yield from (((inside / name).as_posix() + "/", 0) for name in folders)


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a dangling link; reading it will say so
        return -1


def as_tree(path: Path, entries: Iterable[tuple[str, int]]) -> Tree:
    files, folders, marks = [], set(), {}
    for name, mark in entries:
        parts = name.rstrip("/").split("/")
        if any(part.startswith((".", "__MACOSX", "@eaDir")) for part in parts):
            continue
        is_file = not name.endswith("/")
        for depth in range(1, len(parts) + (not is_file)):
            folders.add("/".join(parts[:depth]))
        if is_file and name.lower().endswith(SUFFIXES):
            files.append(name)
            marks[name] = mark
    listing = "\n".join(f"{name}\t{marks[name]}" for name in sorted(marks))
    return Tree(path, sorted(set(files)), folders, hashlib.sha256(listing.encode()).hexdigest())


def find_splits(tree: Tree) -> dict[str, Split]:
    """`train`, and `test` and `val` where folders of these names are beside it."""
    prefix = skip_wrapping(tree)
    below = {VAL_NAMES.get(name.lower(), name.lower()): Split(tree, f"{prefix}{name}/") for name in children(tree, prefix)}
    found = {name: below[name] for name in ("train", "val", "test") if name in below}
    return found if "train" in found and len(found) > 1 else {"train": Split(tree, prefix)}


def skip_wrapping(tree: Tree) -> str:
    prefix = ""
    while len(below := children(tree, prefix)) == 1 and children(tree, f"{prefix}{below[0]}/"):
        prefix += f"{below[0]}/"
    return prefix


def children(tree: Tree, prefix: str) -> list[str]:
    """Names of the folders directly below, sorted."""
    names = (name[len(prefix) :] for name in tree.folders if name.startswith(prefix))
    return sorted(name for name in names if "/" not in name)


def class_folders(split: Split) -> tuple[str, ...]:
    return tuple(children(*split))


def no_classes(split: Split, classes: tuple[str, ...]) -> str:
    tree, prefix = split
    loose = sum(name.startswith(prefix) and "/" not in name[len(prefix) :] for name in tree.files)
    found = f"one class folder ({classes[0]})" if classes else "no class folders"
    found += f" and {loose} images outside them" if loose else ""
    return f"data.path {tree.path}: {found}; a folder for each of 2 classes or more is needed, with its images inside"


def check_same_classes(name: str, wanted: tuple[str, ...], found: tuple[str, ...], split: Split) -> None:
    if found == wanted:
        return
    lacks, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    what = [
        f"{verb} {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for verb, names in (("lack", lacks), ("add", extra))
        if names
    ]
    where = f"{split.tree.path}/{split.prefix}".rstrip("/")
    raise UserError(
        f"the {name} images in {where} {' and '.join(what)}: their class folders must be those of the training images"
    )


def as_pool(split: Split, classes: tuple[str, ...], size: int) -> Pool:
    tree, prefix = split
    index = {name: i for i, name in enumerate(classes)}
    files = [name for name in tree.files if name.startswith(prefix) and "/" in name[len(prefix) :]]
    labels = torch.tensor([index[name[len(prefix) :].split("/")[0]] for name in files], dtype=torch.int64)
    return Pool(labels, partial(read, tree.path, files, size))


def read(path: Path, files: list[str], size: int, ids: Tensor, tick: Tick) -> Images:
    """Decode the files at these positions with all cores."""
    pixels = torch.zeros(len(ids), 3, size, size, dtype=torch.uint8)
    target, names, unreadable = pixels.numpy(), [files[i] for i in ids.tolist()], []
    with ExitStack() as stack:
        # The filter is the process's own: threads cannot have theirs.  Pillow only warns of the smaller bombs.
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        fetch = opener(path, stack)
        workers = stack.enter_context(ThreadPoolExecutor())
        starts = range(0, len(names), BLOCK)
        jobs = (partial(decode_block, fetch, names[i : i + BLOCK], target[i : i + BLOCK]) for i in starts)
        try:
            for number, failures in workers.map(lambda job: job(), jobs):
                unreadable += failures
                tick(number)
        finally:
            workers.shutdown(cancel_futures=True)
    return Images(pixels, unreadable)


def opener(path: Path, stack: ExitStack) -> Callable[[str], bytes]:
    """A function from a name to the file's bytes, for any thread, until the stack closes."""
    if path.is_dir():
        return lambda name: (path / name).read_bytes()
    archive, lock = stack.enter_context(zipfile.ZipFile(path)), threading.Lock()  # a handle per thread was no faster

    def fetch(name: str) -> bytes:
        with lock:
            return archive.read(name)

    return fetch


def decode_block(fetch: Callable[[str], bytes], names: list[str], target: np.ndarray) -> tuple[int, list[str]]:
    """Fill target (n, 3, S, S); the number of files and what was wrong with some."""
    failures = []
    for name, pixels in zip(names, target, strict=True):
        try:
            pixels[:] = decode(fetch(name), target.shape[-1])
        except UnidentifiedImageError:
            failures.append(f"{name} (not an image)")
        except Exception as error:  # Pillow and zipfile raise a dozen types for damaged files; each is told to the user
            failures.append(f"{name} ({' '.join(str(error).split()) or type(error).__name__})")
    return len(names), failures


def decode(raw: bytes, size: int) -> np.ndarray:
    """(3, S, S) uint8: upright, RGB, the centre square resized (bilinear, antialiased).  Of an animation the first image."""
    with Image.open(io.BytesIO(raw)) as image:
        ImageOps.exif_transpose(image, in_place=True)
        rgb = as_rgb(image)
    side = min(rgb.size)
    left, top = (rgb.width - side) / 2, (rgb.height - side) / 2
    small = rgb.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    return np.asarray(small).transpose(2, 0, 1)


def as_rgb(image: Image.Image) -> Image.Image:
    """Transparency is dropped, as torchvision's ImageFolder does; of 16 bits the upper 8 are kept (Pillow would clip)."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no known range; convert to 8 or 16 bits")
    return image.convert("RGB")
