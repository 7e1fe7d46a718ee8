"""Faults of the machine, made for real where that is possible."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534
NAMESPACES = subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0  # mounts of one's own


@contextmanager
def as_nobody(folder: Path) -> Iterator[None]:
    """Within, `folder` may be read and not written, also where the tests are root's, whom no permission stops."""
    root = os.getuid() == 0
    way = [p for p in folder.absolute().parents if not p.stat().st_mode & 0o001] if root else []
    inside = [folder, *(p for p in folder.rglob("*") if p.is_dir())]
    before = {path: path.stat().st_mode for path in (*way, *inside)}
    try:
        for path in way:
            path.chmod(before[path] | 0o055)
        for path in inside:
            path.chmod(0o755 if root else 0o555)
        if root:
            os.seteuid(NOBODY)
        yield
    finally:
        if root:
            os.seteuid(0)
        for path, mode in before.items():
            path.chmod(mode)
