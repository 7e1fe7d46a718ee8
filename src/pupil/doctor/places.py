"""The folders that are written to: whether they can be, and how much room there is."""

import configparser
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pupil.doctor.finding import Finding

LEAST = 2e9  # bytes
MOUNTS = Path("/proc/self/mounts")
MORE_ROOM = "make clean && dvc gc --workspace"  # outputs that the cache holds too, then what params.yaml does not name


def places(root: Path) -> dict[str, Path]:
    """What is written by whom."""
    inside = {name: root / name for name in ("out", "reports", "runs", ".work", "mlruns", ".dvc/tmp")}
    return {"checkout": root, **inside, "DVC's cache": cache(root), "temporary files": Path(tempfile.gettempdir())}


def cache(root: Path) -> Path:
    """.dvc/cache, or what `dvc cache dir` has set."""
    found = root / ".dvc/cache"
    for name in ("config", "config.local"):
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(root / ".dvc" / name)
        except configparser.Error:
            continue
        if parser.has_option("cache", "dir"):
            found = root / ".dvc" / Path(parser.get("cache", "dir").strip()).expanduser()
    return found


def existing(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    return next(p for p in (path, *path.parents) if os.path.lexists(p))


def writable(root: Path) -> Iterator[Finding]:
    fine = True
    for about, path in places(root).items():
        where = existing(path)
        try:
            with tempfile.TemporaryFile(dir=where) as file:
                file.write(b"x")
        except OSError as e:
            fine = False
            yield Finding("writing", f"{about}: {where}: {e.strerror}", mend(where, e.errno))
    if fine:
        yield Finding("writing", "checkout, cache and temporary files can be written")


def mend(where: Path, code: int | None) -> str:
    if code in (errno.ENOTDIR, errno.ENOENT):  # a file, or a dangling link
        return f"mv {where} {where}.old"
    if code in (errno.ENOSPC, errno.EDQUOT):
        return MORE_ROOM
    if code == errno.EROFS:
        return f"mount -o remount,rw {mount(where)}"
    return f'sudo chown -R "$USER" {where} && chmod -R u+rwX {where}'


def mount(path: Path) -> Path:
    """Where the disk that a folder is on is mounted; Python's own is_mount sees no bind mounts."""
    mounted = {line.split()[1].replace("\\040", " ") for line in MOUNTS.read_text().splitlines()}
    return next(p for p in (path.resolve(), *path.resolve().parents) if str(p) in mounted | {"/"})


def space(root: Path) -> Iterator[Finding]:
    """A line for each disk."""
    disks: dict[int, tuple[list[str], Path]] = {}
    for about, path in places(root).items():
        where = existing(path)
        if where.exists():
            disks.setdefault(where.stat().st_dev, ([], where))[0].append(about)
    for names, where in disks.values():
        free = shutil.disk_usage(where).free
        short = free < LEAST
        said = f"{free / 1e9:,.1f} GB free for {', '.join(names)}{', 2 are needed' if short else ''}"
        yield Finding("disk", said, MORE_ROOM if short else "")
