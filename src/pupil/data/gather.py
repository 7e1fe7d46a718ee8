"""Reads the images that were drawn into one file per split, a block at a time, without those that cannot be read."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pupil.data.base import Content, Data
from pupil.data.classes import Labelling
from pupil.data.draw import Drawn
from pupil.data.files import FileWriter, Writer
from pupil.data.report import Seen
from pupil.types import UserError

BLOCK = 1 << 24  # bytes of pixels in memory at once
Progress = Callable[[int, int], None]  # images read, of how many


class Gathered(NamedTuple):
    """Of one split, what went into its file."""

    seen: Seen
    labels: Tensor  # (n,) int64
    sha256: str  # of images, labels and ids


class Reading(NamedTuple):
    folders: dict[str, dict[str, Gathered]]  # folder -> split -> what is there
    unreadable: list[str]  # name and reason of each image left out
    levels: Tensor  # (3, 256) int64, how often each value is there in each channel of all training images


def read(
    config: Data,
    content: Content,
    drawn: dict[str, Drawn],
    chosen: list[int],
    folders: Mapping[str, Labelling],
    out: Path,
    progress: Progress,
) -> Reading:
    """Writes out/<folder>/<split>.safetensors for every folder, each with its own part and labels of the classes `chosen`."""
    total, done = sum(len(d.ids) for d in drawn.values()), 0

    def tick(number: int) -> None:
        nonlocal done
        done += number
        progress(done, total)

    relabel = torch.full((len(content.classes),), -1)
    relabel[chosen] = torch.arange(len(chosen))
    pools = {"train": content.train, "val": content.val, "test": content.test}
    found = Reading({folder: {} for folder in folders}, [], torch.zeros(3, 256, dtype=torch.int64))
    present: dict[str, Tensor] = {}  # split -> number of readable images of each class
    for name, (home, ids) in drawn.items():
        pool = pools[home]
        assert pool is not None, "drawn from a split that is there"
        names = [f"{home} {i}" if pool.names is None else pool.names[i] for i in ids.tolist()]
        classes, fine = relabel[pool.labels[ids]], torch.ones(len(ids), dtype=torch.bool)
        sizes, marks = torch.zeros(len(ids), 2, dtype=torch.int64), []
        labels = {folder: mine.labels[classes] for folder, mine in folders.items()}
        kind = FileWriter if config.crop == "resized" and name == "train" else Writer
        writers = {folder: kind(out / folder / f"{name}.safetensors", len(ids), config.image_size) for folder in folders}
        for block in torch.arange(len(ids)).split(max(1, BLOCK // (3 * config.image_size**2))):
            images = pool.read(ids[block], tick)
            sizes[block] = images.sizes
            marks += images.marks
            for i, reason in images.unreadable.items():
                fine[block[i]] = False
                found.unreadable.append(f"{names[block[i]]} ({reason})")
            for folder, writer in writers.items():
                writer.add(images, fine[block] & (labels[folder][block] >= 0))
            if name == "train":
                found.levels.add_(histogram(images.pixels if fine[block].all() else images.pixels[fine[block]]))
        present[name] = classes[fine].bincount(minlength=len(chosen))
        for folder, writer in writers.items():
            kept = (fine & (labels[folder] >= 0)).nonzero().flatten()
            places = kept.tolist()
            seen = Seen([names[i] for i in places], sizes[kept], [marks[i] for i in places])
            digest = writer.finish(labels[folder][kept], ids[kept])
            found.folders[folder][name] = Gathered(seen, labels[folder][kept], digest)
    if config.unreadable == "stop" and found.unreadable:
        raise UserError(
            f"cannot read {told(found.unreadable)}; mend or remove what is damaged, or leave it out with data.unreadable=drop"
        )
    for name, counts in present.items():
        for k in (counts == 0).nonzero().flatten().tolist():
            lost = content.classes[chosen[k]]
            raise UserError(f"no image of class {lost!r} for {name} can be read; mend its files or leave it out")
    return found


def told(unreadable: list[str]) -> str:
    if len(unreadable) == 1:
        return f"image {unreadable[0]}"
    more = f" and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
    return f"{len(unreadable)} images: {', '.join(unreadable[:5])}{more}"


def histogram(images: Tensor) -> Tensor:
    """(n, 3, S, S) uint8 -> (3, 256) int64."""
    counts = torch.zeros(3, 256, dtype=torch.int64)
    for block in images.split(max(1, (1 << 20) // images.shape[-1] ** 2)):
        counts += torch.stack([block[:, c].flatten().bincount(minlength=256) for c in range(3)])
    return counts
