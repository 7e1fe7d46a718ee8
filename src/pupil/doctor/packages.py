"""Python and the installed packages, against requirements.txt."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from pupil.doctor.finding import SETUP, Finding
from pupil.installed import dali_packages, installed, normal

LOCKED = re.compile(r"^([\w.-]+)(?:\[[^\]]*\])?==([^\s;\\]+)", re.MULTILINE)
MADE_FOR = (3, 11)  # the lock


def python(root: Path) -> Iterator[Finding]:
    """Older than 3.11 does not come here: `pupil` refuses it."""
    here, venv = ".".join(map(str, sys.version_info[:3])), root / ".venv"
    yield Finding("python", f"{here}, {sys.executable}", "" if sys.version_info[:2] == MADE_FOR else SETUP)
    if (venv / "bin/python").exists() and Path(sys.prefix).resolve() != venv.resolve():
        yield Finding("python", f"{sys.prefix} is used, not .venv of this checkout", "source .venv/bin/activate")


def packages(root: Path) -> Iterator[Finding]:
    """What is missing or of another version than requirements.txt has."""
    lock, here = locked(root), installed()
    if not lock:
        yield Finding("packages", "requirements.txt is not there or names no version", "git checkout requirements.txt")
        return
    missing = sorted(name for name in lock if name not in here)
    other = [f"{name} {here[name]}, locked {lock[name]}" for name in lock if name in here and public(here[name]) != lock[name]]
    for what, found in (("missing", missing), ("of another version", other)):
        if found:
            more = f" and {len(found) - 8} more" if len(found) > 8 else ""
            yield Finding("packages", f"{len(found)} of {len(lock)} are {what}: {', '.join(found[:8])}{more}", SETUP)
    if not missing and not other:
        yield Finding("packages", f"all {len(lock)} as requirements.txt has them")


def dali(root: Path) -> Iterator[Finding]:
    found = dali_packages()
    if len(found) > 1:
        yield Finding("DALI", f"{' and '.join(found)} overwrite one another's files", SETUP)
    else:
        yield Finding("DALI", found[0] if found else "not installed; loader: auto uses Pillow")


def locked(root: Path) -> dict[str, str]:
    path = root / "requirements.txt"
    return {normal(name): version for name, version in LOCKED.findall(path.read_text())} if path.is_file() else {}


def public(version: str) -> str:
    """2.15.0+cu126 is 2.15.0 built in another way."""
    return version.partition("+")[0]
