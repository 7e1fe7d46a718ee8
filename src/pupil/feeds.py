"""The batches of a training, and the device that they are on."""

from typing import NamedTuple

import torch

from pupil import driver
from pupil.data import Prepared
from pupil.data.augment import Augment
from pupil.data.batches import Batches
from pupil.data.memory import choose
from pupil.types import UserError


class Loaders(NamedTuple):
    train: Batches
    val: Batches
    test: Batches
    about: str  # where their images are
    data: str  # the digest of the prepared data


def loaders(
    data: Prepared,
    batch_size: int,
    seed: int,
    device: torch.device,
    loader: str = "auto",
    two_views: bool = False,
    views: int | None = None,
) -> Loaders:
    m = data.manifest
    augment = Augment(**m["augment"])
    need = sum(images.bytes for images in data.pixels.values())
    chosen = choose(loader, need, device, augment.crop == "resized", two_views)
    train, val, test = ((data.pixels[name], data.splits[name][1], m["mean"], m["std"]) for name in ("train", "val", "test"))
    shown = chosen.train(*train, batch_size, device, seed, augment, two_views, views=views)
    return Loaders(shown, chosen.still(*val, 256, device), chosen.still(*test, 256, device), chosen.why, m["digest"])


def pick_device(name: str) -> torch.device:
    """`auto`: the GPU where there is one."""
    if name == "auto":
        if not torch.cuda.is_available() and driver.gpus() and not driver.hidden():
            raise UserError(
                f"device: {', '.join(driver.gpus())} is here, but torch {torch.__version__} sees no GPU;"
                " python -m pupil doctor says why, device=cpu trains without it"
            )
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device: {name} was asked for, but torch {torch.__version__} sees no GPU; use auto or cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.index is not None and device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise UserError(f"device: there are {torch.cuda.device_count()} GPUs, got {name!r}")
    return device
