"""The table of data sets, and those that come as arrays: digits (embedded in scikit-learn), CIFAR and Fashion-MNIST."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch

from pupil.data.augment import Augment
from pupil.data.base import Content, Data, Source, in_memory
from pupil.data.folder import folder
from pupil.data.layouts import cub200, imagenet, mit67, tiny_imagenet, tiny_imagenet_cskd, tiny_imagenet_cskd_glob
from pupil.data.shards import shards
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
    dataset = from_torchvision(config, kind)
    train, test = fetch(config, dataset, f"{dataset.filename} from {dataset.url}", "")
    pools = [
        in_memory(torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets), config.image_size)
        for part in (train, test)
    ]
    return Content(tuple(train.classes), train=pools[0], test=pools[1])


def fashion_mnist(config: Data) -> Content:
    """60,000 and 10,000 grey images of 28 x 28, three equal channels; torchvision downloads and checks them like CIFAR."""
    dataset = from_torchvision(config, "FashionMNIST")
    names = ", ".join(name for name, _ in dataset.resources)
    parts = fetch(config, dataset, f"{names} from {dataset.mirrors[0]}", "/FashionMNIST/raw")
    pools = [in_memory(part.data[:, None].expand(-1, 3, -1, -1), part.targets, config.image_size) for part in parts]
    return Content(tuple(dataset.classes), train=pools[0], test=pools[1])


def from_torchvision(config: Data, kind: str) -> Any:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise UserError(f"{config.name} is read by torchvision, which is not installed ({error}); install it") from error
    return getattr(datasets, kind)


def fetch(config: Data, dataset: Any, files: str, below: str) -> list[Any]:
    """torchvision's training and test set; downloaded unless they are there and their checksums agree."""
    home = Path(config.path or "downloads").expanduser()
    try:
        with patience(30):
            return [dataset(home, train=part, download=True) for part in (True, False)]
    except (OSError, RuntimeError, AssertionError, ValueError, HTTPException) as error:
        reason = " ".join(str(error).split()) or "a file is cut short"
        raise UserError(
            f"{config.name} is not in {home} or is damaged, and could not be downloaded ({reason}); "
            f"put {files} into {home}{below}, or name its folder with data.path"
        ) from error


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """New connections give up after this long: behind a firewall that drops packets a download hangs for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100 = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
FASHION = ((0.2860,) * 3, (0.3530,) * 3)
TINY = ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3, (0.5,) * 3)
CROP, FLIP, RESIZED = Augment(4, True), Augment(0, True), Augment(0, True, "resized")

# What the authors did beyond what the loaders offer stands in the row.
SOURCES: dict[str, Source] = {
    "digits": Source(
        "1,797 handwritten digits, comes with scikit-learn, nothing to download", 10, 8, Augment(4, False), digits
    ),
    "cifar10": Source("CIFAR-10, 50,000 + 10,000 colour images", 10, 32, CROP, cifar10, CIFAR10),
    "cifar100": Source("CIFAR-100, 50,000 + 10,000 colour images", 100, 32, CROP, cifar100, CIFAR100),
    "fashion_mnist": Source("Fashion-MNIST, 60,000 + 10,000 grey images", 10, 28, CROP, fashion_mnist, FASHION),
    "tiny_imagenet": Source(
        "Tiny-ImageNet-200, 100,000 + 10,000; as mdistiller, without its rotation", 200, 64, FLIP, tiny_imagenet, TINY
    ),
    "tiny_imagenet_sakd": Source(
        "Tiny-ImageNet-200 as spot-adaptive-pytorch: CIFAR-10's mean and std", 200, 64, FLIP, tiny_imagenet, CIFAR10
    ),
    "tiny_imagenet_cskd": Source(
        "Tiny-ImageNet-200 as CSKD: val halved into validation and test by name, ImageNet's mean and std",
        200,
        64,
        FLIP,
        tiny_imagenet_cskd,
        IMAGENET,
    ),
    "tiny_imagenet_cskd_glob": Source(
        "the same, halved in the order of the folder's listing, as CSKD's code: differs from machine to machine",
        200,
        64,
        FLIP,
        tiny_imagenet_cskd_glob,
        IMAGENET,
    ),
    "cub200": Source("CUB-200-2011, 5,994 + 5,794 birds; as CSKD", 200, 224, RESIZED, cub200, HALF),
    "cub200_refilled": Source("CUB-200-2011 as REFILLED: ImageNet's mean and std", 200, 224, RESIZED, cub200, IMAGENET),
    "mit67": Source("MIT-67 indoor scenes, 5,360 + 1,340; as CSKD", 67, 224, RESIZED, mit67, IMAGENET),
    "imagenet": Source(
        "ImageNet folders train and val; random resized crops of the files, or data.crop=pad for pixels of one size",
        1000,
        224,
        RESIZED,
        imagenet,
        IMAGENET,
    ),
    "folder": Source("your own images: a folder or .zip with one folder per class", None, None, CROP, folder),
    "shards": Source("your own images: WebDataset shards, a folder of .tar files", None, None, CROP, shards),
}
