"""Where the pixels of a data set are while it is trained on: in memory, or on disk."""

import os
from pathlib import Path

import torch

from pupil.data.resident import Resident, Streamed

LOADERS = ("auto", "resident", "streamed")


def choose(loader: str, need: int, device: torch.device) -> tuple[type[Resident], str]:
    """The loader for `need` bytes of pixels, and a line that says why; auto: resident below half of the free memory."""
    free = free_memory(device)
    kind = Streamed if loader == "streamed" or (loader == "auto" and need >= free / 2) else Resident
    how = "read from disk batch by batch" if kind is Streamed else "in memory"
    return kind, f"images {how} (loader {loader}): {need / 1e6:,.0f} MB, of {free / 1e6:,.0f} MB free on {device}"


def free_memory(device: torch.device) -> int:
    """Bytes.  On the CPU Linux's own estimate, which counts the file cache as free; elsewhere all there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
