"""Prepared data that are read while a training runs must stay what they were when it began."""

from collections.abc import Mapping
from pathlib import Path

from pupil.types import UserError

Stamp = tuple[int, int, int]


def stamp(path: Path) -> Stamp:
    """File, size and time: of content that is written anew at least one is another."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def refuse_changed(stamps: dict[Path, Stamp], digests: Mapping[Path, str]) -> None:
    """Of each file the stamp when its SHA-256 was checked, and that SHA-256; only what has another stamp is read again."""
    from pupil.data.files import sha256

    for path, before in stamps.items():
        try:
            now = stamp(path)
            if now != before and sha256(path) != digests[path]:
                raise ValueError("it holds something else")
            stamps[path] = now
        except (OSError, ValueError):
            raise UserError(
                f"{path} has changed or gone while this was training; bring it back (dvc checkout, or dvc repro prepare) and"
                " run the same command: it goes on from before the change; with other data it begins anew"
            ) from None
