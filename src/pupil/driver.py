"""Whether this machine has an NVIDIA GPU, whatever torch sees of it.  No torch."""

import os
from pathlib import Path

DEVICES, DRIVER = Path("/dev"), Path("/proc/driver/nvidia/version")


def gpus() -> list[str]:
    """The devices that a process here may open: nvidia0, ...; /proc shows a driver in containers without them too."""
    return sorted(p.name for p in DEVICES.glob("nvidia[0-9]*"))


def hidden() -> bool:
    """By the user, who wants none."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
