"""Imported first by every way in: says in one line which package is missing that nothing works without."""

import sys
from importlib.util import find_spec

PACKAGES = ("torch", "torchvision", "safetensors", "numpy", "PIL")


def missing() -> list[str]:
    return [name for name in PACKAGES if find_spec(name) is None]


if lacking := missing():
    sys.stderr.write(
        f"error: {', '.join(lacking)} cannot be found by {sys.executable}; `make setup` and `source .venv/bin/activate`,"
        " `python -m pupil doctor` says more\n"
    )
    sys.exit(2)
