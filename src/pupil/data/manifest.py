"""manifest.json of prepared data, read back: whole, as it was written, or refused."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pupil import facts
from pupil.sealed import read_sealed

VERSION = 2
BESIDE = {
    "digest",
    "fingerprint",
    "config",
    "unreadable",
    "teacher_classes",
    "unmerged",
}  # decide no number that a network sees
KINDS = {
    **facts.IMAGES,
    "name": lambda x: isinstance(x, str),
    **dict.fromkeys(("counts", "augment", "sha256", "config"), lambda x: isinstance(x, dict)),
    "teacher_classes": lambda x: x is None or facts.names(x),
}


def digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all that decides the numbers a network sees."""
    seen = {key: value for key, value in manifest.items() if key not in BESIDE}
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


def read(path: Path) -> dict[str, Any]:
    """ValueError where it is damaged; of another format only its version is looked at."""
    found = read_sealed(path)
    version = found.get("version") if isinstance(found, dict) else None
    if version != VERSION:
        return {"version": version}
    if (key := facts.wrong(found, KINDS)) is not None:
        raise ValueError(f"{path.name}: {key} is missing or cannot be")
    if digest(found) != found.get("digest"):
        raise ValueError(f"{path.name} is not what its digest says")
    return found
