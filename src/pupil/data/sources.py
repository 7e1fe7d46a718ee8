"""The table of data sets, and those that come as arrays: digits (embedded in scikit-learn), CIFAR-10 and CIFAR-100."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch

from pupil.data.base import Content, Data, Source, in_memory
from pupil.data.folder import folder
from pupil.data.resident import Augment
from pupil.types import UserError


def digits(config: Data) -> Content:
    """1797 grey images, values 0..16 stretched to 0..255, three equal channels; there is no test split."""
    if config.path is not None:
        raise UserError(f"data.path is {config.path!r}: digits comes with scikit-learn and reads no path; leave it out")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            f"digits comes with scikit-learn, which is not installed ({error}); install it or use cifar10"
        ) from error
    found: Any = load_digits()
    grey = (torch.tensor(found.images).float() * (255 / 16)).round().to(torch.uint8)
    pixels = grey[:, None].expand(-1, 3, -1, -1)
    pool = in_memory(pixels, torch.tensor(found.target, dtype=torch.int64), config.image_size)
    return Content(tuple(str(digit) for digit in range(10)), pool, rest_is_test=True)


def cifar10(config: Data) -> Content:
    return cifar(config, "CIFAR10")


def cifar100(config: Data) -> Content:
    return cifar(config, "CIFAR100")


def cifar(config: Data, kind: str) -> Content:
    """50,000 and 10,000 images of 32 x 32; downloaded by torchvision unless they are there and their checksums agree."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise UserError(f"{config.name} is read by torchvision, which is not installed ({error}); install it") from error
    dataset = getattr(datasets, kind)
    home = Path(config.path or "downloads").expanduser()
    try:
        with patience(30):
            train, test = (dataset(home, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError, HTTPException) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{config.name} is not in {home} or is damaged, and could not be downloaded ({reason}); "
            f"put {dataset.filename} from {dataset.url} into {home}, or name its folder with data.path"
        ) from error
    pools = [
        in_memory(torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets), config.image_size)
        for part in (train, test)
    ]
    return Content(tuple(train.classes), train=pools[0], test=pools[1])


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """New connections give up after this long: behind a firewall that drops packets a download hangs for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


SOURCES: dict[str, Source] = {
    "digits": Source(
        "1,797 handwritten digits, comes with scikit-learn, nothing to download", 10, 8, Augment(4, False), digits
    ),
    "cifar10": Source(
        "CIFAR-10, 50,000 + 10,000 colour images",
        10,
        32,
        Augment(4, True),
        cifar10,
        ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    ),
    "cifar100": Source(
        "CIFAR-100, 50,000 + 10,000 colour images",
        100,
        32,
        Augment(4, True),
        cifar100,
        ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    ),
    "folder": Source("your own images: a folder or .zip with one folder per class", None, None, Augment(4, True), folder),
}
