"""Which loader makes the batches, and why: by what is asked for, the crops, the free memory and what is installed."""

import os
from pathlib import Path
from typing import NamedTuple

import torch

from pupil.data.batches import Batches
from pupil.data.dali import Dali, installed
from pupil.data.resident import Resident, Streamed
from pupil.data.workers import Workers
from pupil.installed import dali_packages
from pupil.types import UserError

LOADERS = ("auto", "resident", "streamed", "workers", "dali")
KINDS: dict[str, type[Batches]] = {"resident": Resident, "streamed": Streamed, "workers": Workers, "dali": Dali}
HOW = {
    Resident: "in memory",
    Streamed: "read from disk batch by batch",
    Workers: "decoded by worker processes",
    Dali: "decoded by DALI",
}


class Choice(NamedTuple):
    train: type[Batches]
    still: type[Batches]  # of images that are not augmented, which are always pixels of one size
    why: str


def choose(loader: str, need: int, device: torch.device, resized: bool = False, two_views: bool = False) -> Choice:
    """The loaders for `need` bytes of images, and a line that says why; auto: resident below half of the free memory."""
    possible(loader, resized)
    free = free_memory(device)
    fits = need < free / 2
    still = Streamed if loader == "streamed" or (loader != "resident" and not fits) else Resident
    room = f"{need / 1e6:,.0f} MB, of {free / 1e6:,.0f} MB free on {device}"
    if loader != "auto":
        kind, why = KINDS[loader], room
    elif not resized:
        kind, why = still, room
    elif two_views or not installed():
        kind, why = Workers, f"random resized crops, {'in two views' if two_views else 'and DALI is not installed'}"
    else:
        kind, why = Dali, "random resized crops, and DALI is installed"
    return Choice(kind, still, f"images {HOW[kind]} (loader {loader}): {why}")


def possible(loader: str, resized: bool) -> None:
    """A loader that is asked for must be there and suit the crops."""
    if loader == "dali" and not installed():
        raise UserError("loader: dali was asked for, but nvidia-dali-cuda120 is not installed; install it, or use auto")
    if (loader == "dali" or (loader == "auto" and resized and installed())) and len(several := dali_packages()) > 1:
        raise UserError(
            f"loader: {' and '.join(several)} overwrite one another's files; keep one (python -m pupil doctor says how), or use"
            " loader=workers"
        )
    if resized and loader in ("resident", "streamed"):
        raise UserError(
            f"loader: {loader} keeps pixels of one size, and the crops of these data are resized from the image files;"
            " use auto, dali or workers, or data.crop=pad"
        )


def free_memory(device: torch.device) -> int:
    """Bytes.  On the CPU Linux's own estimate, which counts the file cache as free; elsewhere all there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
