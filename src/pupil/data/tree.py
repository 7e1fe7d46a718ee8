"""The files of a folder, a .zip or a .tar.gz: their names, and their bytes when asked for; nothing is unpacked beside it."""

import gzip
import hashlib
import mmap
import shutil
import tarfile
import tempfile
import threading
import zipfile
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from pupil.data.limits import HIDDEN, copy_limited, counted, fits, refuse_bomb, walk
from pupil.types import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif")
TAR = (".tar.gz", ".tgz", ".tar")


class Tape(NamedTuple):
    """A .tar.gz, unpacked to a nameless temporary file: gzip cannot be read from the middle."""

    content: mmap.mmap
    places: Mapping[str, tuple[int, int]]  # name -> first byte, number of bytes


class Tree(NamedTuple):
    """Names are relative to `path`, with slashes."""

    path: Path
    files: list[str]  # images, sorted
    texts: list[str]  # .txt files, sorted
    folders: set[str]
    fingerprint: str  # SHA-256 of the images' names with sizes, or with the checksums that a zip file holds
    tape: Tape | None
    archive: zipfile.ZipFile | None  # kept open: its table of contents is read once


def list_tree(key: str, given: str) -> Tree:
    path, about = Path(given).expanduser(), f"{key} is {given!r}"
    if path.is_dir():
        return as_tree(about, path, walk(about, path, (*SUFFIXES, ".txt")))
    if not path.exists():
        raise UserError(f"{key} is {given!r}: there is no such folder or .zip file; correct the path")
    if path.name.lower().endswith(TAR):
        try:
            tape = wind(about, path)
        except UserError:
            raise
        except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
            raise UserError(f"{about}: this .tar.gz file cannot be read ({error}); fetch it again") from error
        return as_tree(about, path, ((name, size) for name, (_, size) in tape.places.items()), tape)
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise UserError(f"{about}: neither a folder nor a .zip file that can be read ({error})") from error
    entries = archive.infolist()
    if any(entry.flag_bits & 1 for entry in entries):
        raise UserError(f"{about}: the .zip file is encrypted; give one without a password")
    refuse_bomb(about, path.stat().st_size, sum(entry.file_size for entry in entries))
    return as_tree(about, path, ((entry.filename, entry.CRC) for entry in entries), archive=archive)


def wind(about: str, path: Path) -> Tape:
    """Links and devices in it are left out."""
    with tempfile.TemporaryFile() as file:
        with open(path, "rb") if path.suffix == ".tar" else gzip.open(path) as packed:
            copy_limited(about, packed.read, path.stat().st_size, file, shutil.disk_usage(tempfile.gettempdir()).free)
        end = file.tell()
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            entries = ((member.name.removeprefix("./"), member) for member in archive if member.isfile() or member.isdir())
            places = {name + "/" * m.isdir(): (m.offset_data, m.size) for name, m in entries}
        if any(start + size > end or size < 0 for start, size in places.values()):
            raise EOFError("it is cut short")
        return Tape(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), places)


def as_tree(
    about: str, path: Path, entries: Iterable[tuple[str, int]], tape: Tape | None = None, archive: zipfile.ZipFile | None = None
) -> Tree:
    texts, folders, marks = set(), set(), {}
    for name, mark in counted(about, entries):
        parts = name.rstrip("/").split("/")
        if any(part.startswith(HIDDEN) for part in parts):
            continue
        is_file = not name.endswith("/")
        for depth in range(1, len(parts) + (not is_file)):
            folders.add("/".join(parts[:depth]))
        if is_file and name.lower().endswith(SUFFIXES):
            marks[name] = mark
        elif is_file and name.endswith(".txt"):
            texts.add(name)
    listing = "\n".join(f"{name}\t{marks[name]}" for name in sorted(marks))
    fingerprint = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()
    return Tree(path, sorted(marks), sorted(texts), folders, fingerprint, tape, archive)


def opener(tree: Tree) -> Callable[[str], bytes]:
    """A function from a name to the file's bytes, for any thread.  What the tree does not list is not there for it."""
    path, tape, archive = tree.path, tree.tape, tree.archive
    lock = threading.Lock()  # a handle per thread was no faster

    def fetch(name: str) -> bytes:
        if not (listed(tree.files, name) or listed(tree.texts, name)):
            raise FileNotFoundError(f"{name} is not there")
        if tape is not None:
            start, size = tape.places[name]
            fits(name, size)
            return tape.content[start : start + size]
        if archive is None:
            fits(name, (path / name).stat().st_size)
            return (path / name).read_bytes()
        fits(name, archive.getinfo(name).file_size)
        with lock:
            return archive.read(name)

    return fetch


def listed(names: list[str], name: str) -> bool:
    at = bisect_left(names, name)
    return names[at : at + 1] == [name]


def lines_of(tree: Tree, name: str) -> list[str]:
    """The lines of a text file that are not empty.  File names need not be UTF-8."""
    try:
        raw = opener(tree)(name)
    except Exception as error:  # as many types as for a damaged image
        raise UserError(f"{tree.path}: cannot read {name} ({' '.join(str(error).split())}); fetch the set again") from None
    return [line for line in raw.decode("utf-8", "surrogateescape").splitlines() if line.strip()]
