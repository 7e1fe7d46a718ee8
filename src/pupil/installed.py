"""Which packages this Python has.  No torch; nothing is imported."""

import re
from collections.abc import Mapping
from importlib.metadata import distributions

DALI = re.compile(r"nvidia-dali(-\w+)?-cuda\d+")


def installed() -> Mapping[str, str]:
    """Name -> version; what comes first on the path is what Python imports."""
    found: dict[str, str] = {}
    for one in distributions():
        name = one.metadata["Name"]
        if name:  # else a folder that was deleted by half
            found.setdefault(normal(name), one.version)
    return found


def dali_packages() -> list[str]:
    """More than one write into one folder, and the files of the one are taken for the other's."""
    return sorted(name for name in installed() if DALI.fullmatch(name))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
