"""Before every command of dvc.yaml into which DVC writes names from params.yaml: a shell must find nothing but names in them.

DVC puts them into a command as they are; this one has none in it, and what follows runs only if it succeeds.
"""

import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from pupil.names import WANTED, plain

KEYS = ("teachers", "students", "methods", "seeds", "shkd", "tables")


def strange(page: dict[str, Any]) -> str | None:
    """The first that is none."""
    for key in KEYS:
        for value in page.get(key) or []:
            name = str(value.get("name") if isinstance(value, dict) else value)
            if not plain(name):
                return f"{key}: {name!r} {WANTED}"
    return None


if __name__ == "__main__" and (found := strange(yaml.safe_load(Path("params.yaml").read_text()))):
    sys.stderr.write(f"error: {found}\n")
    sys.exit(2)
