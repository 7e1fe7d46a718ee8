"""JSON files that anybody may have written, read with a limit on their size.  No torch."""

import json
from pathlib import Path
from typing import Any

MOST = 1 << 28  # bytes; the manifest of a million classes has a tenth of it


def read_json(path: Path) -> Any:
    """What the file holds; ValueError where it is no JSON, too large, or nested too deeply."""
    if path.stat().st_size > MOST:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, more than {MOST}")
    return parse(path.read_text(encoding="utf-8"))


def parse(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
