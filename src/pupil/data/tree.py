"""The files of a folder, a .zip or a .tar.gz: their names, and their bytes when asked for; nothing is unpacked beside it."""

import gzip
import hashlib
import mmap
import os
import shutil
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

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
    path = Path(given).expanduser()
    if path.is_dir():
        return as_tree(path, walk(path))
    if not path.exists():
        raise UserError(f"{key} is {given!r}: there is no such folder or .zip file; correct the path")
    if path.name.lower().endswith(TAR):
        try:
            tape = wind(path)
        except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
            raise UserError(f"{key} is {given!r}: this .tar.gz file cannot be read ({error}); fetch it again") from error
        return as_tree(path, ((name, size) for name, (_, size) in tape.places.items()), tape)
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{key} is {given!r}: neither a folder nor a .zip file that can be read ({error})") from error
    entries = archive.infolist()
    if any(entry.flag_bits & 1 for entry in entries):
        raise UserError(f"{key} is {given!r}: the .zip file is encrypted; give one without a password")
    return as_tree(path, ((entry.filename, entry.CRC) for entry in entries), archive=archive)


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


def wind(path: Path) -> Tape:
    with tempfile.TemporaryFile() as file:
        with open(path, "rb") if path.suffix == ".tar" else gzip.open(path) as packed:
            shutil.copyfileobj(packed, file, 1 << 20)
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            places = {
                member.name.removeprefix("./") + "/" * member.isdir(): (member.offset_data, member.size)
                for member in archive
                if member.isfile() or member.isdir()
            }
        return Tape(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), places)


def as_tree(
    path: Path, entries: Iterable[tuple[str, int]], tape: Tape | None = None, archive: zipfile.ZipFile | None = None
) -> Tree:
    texts, folders, marks = set(), set(), {}
    for name, mark in entries:
        parts = name.rstrip("/").split("/")
        if any(part.startswith((".", "__MACOSX", "@eaDir")) for part in parts):
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
    """A function from a name to the file's bytes, for any thread."""
    path, tape, archive = tree.path, tree.tape, tree.archive
    if tape is not None:
        return lambda name: cut(tape, name)
    if archive is None:
        return lambda name: (path / name).read_bytes()
    lock = threading.Lock()  # a handle per thread was no faster

    def fetch(name: str) -> bytes:
        with lock:
            return archive.read(name)

    return fetch


def cut(tape: Tape, name: str) -> bytes:
    if name not in tape.places:
        raise FileNotFoundError(f"{name} is not in the archive")
    start, size = tape.places[name]
    return tape.content[start : start + size]


def lines_of(tree: Tree, name: str) -> list[str]:
    """The lines of a text file that are not empty.  File names need not be UTF-8."""
    raw = opener(tree)(name)
    return [line for line in raw.decode("utf-8", "surrogateescape").splitlines() if line.strip()]
