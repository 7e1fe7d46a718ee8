"""JSON files that carry a checksum of their own content: what was changed by accident is noticed."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pupil.jsonfile import read_json


def checksum(facts: Mapping[str, Any]) -> str:
    """SHA-256 of the content, however it is laid out."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_sealed(path: Path, facts: Mapping[str, Any]) -> None:
    plain = json.loads(json.dumps(facts))
    path.write_text(json.dumps({**plain, "checksum": checksum(plain)}, indent=1, sort_keys=True) + "\n")


def read_sealed(path: Path) -> Any:
    """Without the checksum, which older files and those of others lack; ValueError where it is another one."""
    facts = read_json(path)
    if isinstance(facts, dict) and facts.pop("checksum", None) not in (None, checksum(facts)):
        raise ValueError("its content is not what its checksum says")
    return facts
