"""What a folder or an archive of images may hold: a stranger's must not lead out of itself, nor fill memory or disk."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TypeVar

from pupil.types import UserError

MOST_FILES = 1 << 24
MOST_BYTES = 1 << 29  # of one file: the 89 million pixels that Pillow reads, 6 bytes each
RATIO = 1032  # deflate packs no tighter; entries of a zip file that unpack to more share their bytes
GROWTH, SMALL = 100, 1 << 30  # a .tar.gz of images unpacks to as much as it has bytes; a small one of blank images to more
HIDDEN = (".", "__MACOSX", "@eaDir")

Mark = TypeVar("Mark")


def counted(about: str, entries: Iterable[tuple[str, Mark]]) -> Iterator[tuple[str, Mark]]:
    """The entries, of names that stay inside, and no more of them than there can be."""
    for number, (name, mark) in enumerate(entries):
        if number >= MOST_FILES:
            raise UserError(f"{about}: more than {MOST_FILES} files; give a part of them")
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or "\0" in name:
            raise UserError(
                f"{about}: the name {name[:100]!r} leads out of it; nothing was read: get the images from elsewhere"
            )
        yield name, mark


def refuse_bomb(about: str, packed: int, unpacked: int) -> None:
    """Of a zip file, by the sizes in its table of contents, which unpacking then keeps to."""
    if unpacked > RATIO * packed:
        raise UserError(f"{about}: {packed} bytes unpack to {unpacked}, which no honest .zip does; nothing was read")


def copy_limited(about: str, read: Callable[[int], bytes], size: int, file: IO[bytes], room: int) -> None:
    """Unpacks `size` bytes into a file on a disk with `room` bytes left."""
    most, done = min(max(SMALL, GROWTH * size), int(0.9 * room)), 0
    while block := read(1 << 20):
        done += len(block)
        if done > most:
            why = "the disk of temporary files has no more room" if most < max(SMALL, GROWTH * size) else "no images do that"
            raise UserError(
                f"{about}: {size} bytes unpack to more than {most}, and {why}; unpack it by hand and give the folder"
            )
        file.write(block)


def fits(name: str, size: int) -> None:
    if size > MOST_BYTES:
        raise ValueError(f"{name.rpartition('/')[2]} has {size} bytes, more than {MOST_BYTES}")


def walk(about: str, path: Path, wanted: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Every file and folder below, relative, with slashes, and its size; folders end with a slash, hidden ones are left out.

    Links that stay inside are followed.  `wanted`: ends of the names of files that will be read.
    """
    base = os.path.realpath(path)
    waiting: list[tuple[str, str, tuple[str, ...]]] = [
        ("", str(path), (base,))
    ]  # prefix, folder, the real folders on the way to it
    while waiting:
        inside, here, way = waiting.pop()
        for entry in listing(about, here):
            name, folder = inside + entry.name, entry.is_dir()
            if entry.name.startswith(HIDDEN) or not (folder or name.lower().endswith(wanted)):
                continue
            real = os.path.realpath(entry.path) if entry.is_symlink() else f"{way[-1]}/{entry.name}"
            if entry.is_symlink() and not f"{real}/".startswith(f"{base.rstrip('/')}/"):
                raise UserError(
                    f"{about}: {name} is a link to {real}, outside of it; nothing was read: give a copy without links (cp -rL)"
                )
            if folder and real in way:
                raise UserError(f"{about}: {name} is a link to a folder that it is in; remove the link")
            if folder:
                waiting.append((f"{name}/", entry.path, (*way, real)))
                yield f"{name}/", 0
            else:
                yield name, size_of(about, name, entry)


def listing(about: str, folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"{about}: cannot list {folder}: {error.strerror}") from None


def size_of(about: str, name: str, entry: os.DirEntry[str]) -> int:
    try:
        size = entry.stat().st_size
    except OSError:  # a dangling link; reading it will say so
        return -1
    if not entry.is_file():
        raise UserError(f"{about}: {name} is no file but a pipe or a device; remove it")
    return size
