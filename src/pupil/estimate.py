"""What a configuration will take, for `python -m pupil check`: images, disk, memory on the device, time.

Memory and disk are computed from shapes, time is measured on a few steps; each line says which.
"""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pupil.data import Data
from pupil.data.base import Content
from pupil.data.draw import split_sizes
from pupil.data.prepare import recipe
from pupil.data.shards import some_sizes
from pupil.fit import activate, step, teacher_features
from pupil.flops import synchronize
from pupil.methods.alone import Alone
from pupil.methods.base import Method
from pupil.net import Net
from pupil.optim import make_optimizer
from pupil.settings import Settings
from pupil.speed import choose, quick
from pupil.types import Batch, UserError

PUBLISHED = {  # training and test images
    "digits": (1_797, 0),
    **{f"cifar{n}": (50_000, 10_000) for n in (10, 100)},
    "fashion_mnist": (60_000, 10_000),
    "tiny_imagenet": (100_000, 10_000),
    "cub200": (5_994, 5_794),
    "mit67": (5_360, 1_340),
    "imagenet": (1_281_167, 50_000),
}
MANY = 20_000  # training images with which a method is built for a look
PATIENCE = 2.0  # seconds that a step may be expected to take, to be measured at its full batch
SAMPLE = 200  # files whose size is looked up
COPIES = 3  # of the test logits in predictions.safetensors: last, best_by_val, deployed


def counts(config: Data, content: Content | None, classes: int, share: float) -> dict[str, int]:
    """Images of train, val and test before anything is drawn; `share`: of the source's classes, the `classes` that are used."""
    if content is None:
        held = next((n for name, n in PUBLISHED.items() if config.name.startswith(name)), (0, 0))
        pools = {"train": held[0], "test": held[1]}
    else:
        pools = {name: len(pool.labels) for name in ("train", "val", "test") if (pool := getattr(content, name)) is not None}
    pools = {name: max(classes, round(n * share)) for name, n in pools.items() if n}
    if config.name.startswith("tiny_imagenet_cskd") and content is None:
        pools |= dict.fromkeys(("val", "test"), pools["test"] // 2)
    parts = [*(name for name in ("test", "val") if name not in pools), "train"]
    asked = {"val": config.val_images, "test": config.test_images}
    if config.folds is not None and config.fold is not None:
        test = (asked["test"] or max(classes, round(0.2 * pools["train"]))) if "test" in parts else 0
        left = pools["train"] - test
        val = len(range(config.fold, left, config.folds))
        train = config.train_images or (config.per_class or 0) * classes or left - val
        return {"train": train, "val": val, "test": test or asked["test"] or pools["test"]}
    rest_is_test = config.name == "digits" if content is None else content.rest_is_test
    try:
        sizes = dict(zip(parts, split_sizes(config, parts, pools["train"], classes, rest_is_test), strict=True))
    except UserError:  # the draw will say so, if it is true of the images themselves
        sizes = {"train": pools["train"]}
    return {name: sizes.get(name) or asked.get(name) or pools.get(name, classes) for name in ("train", "val", "test")}


def few(images: int, batch_size: int) -> int:
    """How many training images a method is built with for a look: many are not needed, but the last batch is as large."""
    return images if images <= MANY else images % batch_size + batch_size * (MANY // batch_size)


class Memory(NamedTuple):
    """Bytes on the device while a cell is trained."""

    weights: int  # of all networks, with statistics
    training: int  # gradients and momentum
    banks: int  # what is kept of every training image
    activations: int

    def __str__(self) -> str:
        named = [f"{size / 2**20:,.0f} {name}" for name, size in self._asdict().items() if size >= 2**19]
        return f"{sum(self) / 2**20:,.0f} MiB" + (f" ({', '.join(named)})" if len(named) > 1 else "")


def memory(method: Method | Alone, teacher: Net | None, kept: int, built: int, images: int) -> Memory:
    """`kept`: bytes that a step saves for its way back; `built`: training images the method was built with, of `images`."""
    buffers = list(method.buffers())
    banks = sum(nbytes([b]) for b in buffers if b.dim() and len(b) == built)
    frozen = [] if teacher is None else [*teacher.parameters(), *teacher.buffers()]
    weights = nbytes([*method.parameters(), *frozen]) + nbytes(buffers) - banks
    trained = max(nbytes(p for group in phase.train for p in set(group.module.parameters())) for phase in method.phases())
    return Memory(weights, 2 * trained, banks * images // built, kept)


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class Pace(NamedTuple):
    """Seconds of a step of a whole batch."""

    seconds: float
    batch: int
    tried: int  # images of the steps that were measured

    def of(self, images: int) -> float:
        """An epoch."""
        return -(-images // self.batch) * self.seconds

    def __str__(self) -> str:
        return f"{1e3 * self.seconds:,.0f} ms a step" + (
            "" if self.tried == self.batch else f" by steps of {self.tried} images"
        )


def pace(method: Method | Alone, teacher: Net | None, s: Settings, image_size: int, classes: int, device: torch.device) -> Pace:
    """The median of three steps of the last phase with made images; of a large batch that would take long, of a part of it."""
    batch_size = s.optim.batch_size
    if teacher is not None:
        teacher.to(device)
    method.to(device)
    phase = method.phases()[-1]
    activate(method, phase)
    optimizer, _ = make_optimizer(phase, s.optim)
    speed = choose(s.precision, s.layout, False, device)

    def seconds(n: int, times: int) -> float:
        x, ids = torch.randn(n, 3, image_size, image_size, device=device), torch.arange(n, device=device)
        batch, found = Batch(x, ids % classes, ids, strong=x), []
        for _ in range(times):
            synchronize(device)
            start = time.perf_counter()
            step(method, teacher_features(teacher, batch), batch, phase, optimizer)
            synchronize(device)
            found.append(time.perf_counter() - start)
        return sorted(found)[len(found) // 2]

    with quick(method, teacher, speed):
        tried = min(8, batch_size)
        seconds(tried, 1)
        taken = seconds(tried, 1)
        while tried < batch_size and 2 * taken < PATIENCE:
            tried = min(batch_size, max(2 * tried, int(tried * PATIENCE / (2 * taken))))
            taken = seconds(tried, 1)
        return Pace(seconds(tried, 3) * batch_size / tried, batch_size, tried)


def disk(s: Settings, images: dict[str, int], apart: bool, classes: int, networks: list[tuple[int, int]]) -> str:
    """`networks`: (bytes of the weights, how many of them) of all that are trained."""
    pixels = 3 * s.data.image_size**2
    still = sum(n for name, n in images.items() if name != "train") * pixels
    resized = recipe(s.data).crop == "resized"
    each = file_size(s.data) if resized else pixels
    data = (images["train"] * (each or 0) + still) * (2 if apart else 1)
    more = " and what the training images' own files take" if each is None else ""
    models = sum(size * number for size, number in networks)
    number = sum(number for _, number in networks)
    answers = number * COPIES * images["test"] * classes * 4
    return (
        f"disk: {told(data)}{more} for the prepared images, {told(models)} for the weights of {number} networks,"
        f" {told(answers)} for their answers to the test images; DVC's cache holds the same once more, MLflow the weights"
    )


def file_size(config: Data) -> int | None:
    """Mean bytes of an image file, by a few of them; None where that cannot be seen."""
    path = Path(config.path or "").expanduser()
    if config.path is None or not path.exists():
        return None
    if config.name == "shards":
        sizes = some_sizes(config, SAMPLE)
        return sum(sizes) // len(sizes) if sizes else None
    if path.is_file():  # as a share of the archive
        known = next((n for name, n in PUBLISHED.items() if config.name.startswith(name)), None)
        return None if known is None else path.stat().st_size // sum(known)
    found = []
    for here, _, files in os.walk(path):
        found += [Path(here, name).stat().st_size for name in files[:10]]
        if len(found) >= SAMPLE:
            break
    return sum(found) // len(found) if found else None


def told(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def length(seconds: float) -> str:
    """Seconds for people."""
    for unit, name in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:,.1f} s" if seconds < 10 else f"{seconds:,.0f} s"
