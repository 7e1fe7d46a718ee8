"""Images per second of every loader side by side, against a DataLoader written plainly around Pillow and torchvision.

Two made data sets: pixels of one size (crops after padding) and JPEGs (random resized crops).  All run in turns in one
process; a rate is a median over rounds, and a ratio is ours / plain: above 1 ours is faster.

    python -m benchmarks.loader
    python -m benchmarks.loader --images 2000 --size 224 --batch 64 --rounds 3
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from pupil.data import Data, load, prepare
from pupil.data.augment import Augment
from pupil.data.dali import installed
from pupil.data.memory import KINDS
from pupil.data.workers import cores
from pupil.feeds import pick_device

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROPS = {"pad": ("resident", "streamed", "workers", "dali"), "resized": ("workers", "dali")}
Epoch = Callable[[int], int]  # its number -> images seen


def main(args: list[str] | None = None) -> None:
    given = parser().parse_args(args)
    device = pick_device(given.device)
    print(f"{device}, {cores()} cores, {given.images} images, batches of {given.batch}; images/s")
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch) / "in", given.images, given.size)
        for crop in CROPS:
            rates = measure(runs(Path(scratch), crop, given.size, given.batch, device), given.rounds)
            for name, rate in rates.items():
                print(f"{crop:8} {name:9} {rate:8,.0f}   {rate / rates['plain']:.2f} of plain")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__)
    p.add_argument("--images", type=int, default=600)
    p.add_argument("--size", type=int, default=224, help="pixels that networks see; the files are half as large again")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--device", default="auto")
    return p


def make(folder: Path, images: int, size: int) -> None:
    """JPEGs of two classes, smooth with some noise."""
    rng = np.random.default_rng(0)
    for i in range(images):
        side = (round(size * 1.5), round(size * 1.2))
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(side, Image.Resampling.BICUBIC)
        noisy = np.asarray(coarse).astype(int) + rng.integers(-10, 11, (side[1], side[0], 3))
        place = folder / "train" / "ab"[i % 2] / f"{i}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(place, quality=90)


def runs(scratch: Path, crop: str, size: int, batch: int, device: torch.device) -> dict[str, Epoch]:
    prepare(
        Data(name="folder", path=str(scratch / "in"), image_size=size, crop=crop, val_images=2, test_images=2), scratch / crop
    )
    data = load(scratch / crop)
    augment = Augment(**data.manifest["augment"])
    found: dict[str, Epoch] = {"plain": plain(scratch / "in", augment, size, batch, device)}
    for name in CROPS[crop]:
        if name != "dali" or installed():
            loader = KINDS[name](data.pixels["train"], data.splits["train"][1], MEAN, STD, batch, device, 0, augment)
            found[name] = lambda number, loader=loader: sum(len(b.images) for b in loader.epoch(number))
    return found


def plain(folder: Path, augment: Augment, size: int, batch: int, device: torch.device) -> Epoch:
    """As it is usually written; pixels of one size are resized each time, as ImageFolder has it."""
    square = [v2.Resize(size), v2.CenterCrop(size), v2.RandomCrop(size, augment.pad)]
    crops: list[Any] = [v2.RandomResizedCrop(size)] if augment.crop == "resized" else square
    ends = [v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, True), v2.Normalize(MEAN, STD)]
    images = ImageFolder(folder / "train", v2.Compose([*crops, *ends]))
    loader = DataLoader(images, batch, shuffle=True, num_workers=cores(), pin_memory=device.type == "cuda")
    return lambda number: sum(len(x.to(device, non_blocking=True)) for x, _ in loader)


def measure(epochs: dict[str, Epoch], rounds: int) -> dict[str, float]:
    """Median images per second; the first round, which builds and warms, does not count."""
    rates: dict[str, list[float]] = {name: [] for name in epochs}
    for number in range(rounds + 1):
        for name, epoch in epochs.items():
            start = time.perf_counter()
            images = epoch(number)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            rates[name].append(images / (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in rates.items()}


if __name__ == "__main__":
    main()
