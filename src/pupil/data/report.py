"""What is in a data set, for people: report.json, report.txt and contact_sheet.png beside the prepared images.

All of it is about the images drawn; the rest of the source is not read.  Duplicates are images with equal pixels before
they were resized.
"""

import json
import warnings
from collections import defaultdict
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pupil.data.files import Split

FILES = ("report.txt", "report.json", "contact_sheet.png")
SHEET_CLASSES, SHEET_TRAIN, SHEET_TEST = 20, 10, 5  # rows, and columns of each split


class Seen(NamedTuple):
    """Of one split, what the reading shows and the pixels do not."""

    names: list[str]
    sizes: Tensor  # (n, 2) int64, width and height as they were
    marks: list[bytes]  # hash of the pixels as they were


def write_report(folder: Path, manifest: Mapping[str, Any], splits: Mapping[str, Split], seen: Mapping[str, Seen]) -> None:
    """The same bytes for the same images; without matplotlib there is no picture."""
    counts = manifest["class_counts"]
    report = {
        "name": manifest["name"],
        "counts": manifest["counts"],
        "classes": [
            {"name": name, **{split: counts[split][k] for split in counts}} for k, name in enumerate(manifest["classes"])
        ],
        "native_sizes": native_sizes(torch.cat([s.sizes for s in seen.values()])),
        "dropped": manifest["dropped"],
        "unreadable": manifest["unreadable"],
        "duplicates": duplicates(seen, {name: split.labels for name, split in splits.items()}),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.txt").write_text(as_text(report), encoding="utf-8", errors="backslashreplace")
    try:
        contact_sheet(folder / "contact_sheet.png", manifest["classes"], splits)
    except ImportError:
        return  # a bare machine: the two files above say the same without pictures


def native_sizes(sizes: Tensor) -> dict[str, list[int]]:
    """Minimum, (lower) median, maximum in pixels."""
    sides = {"width": sizes[:, 0], "height": sizes[:, 1]}
    return {name: [int(side.min()), int(side.median()), int(side.max())] for name, side in sides.items()}


def duplicates(seen: Mapping[str, Seen], labels: Mapping[str, Tensor], most: int = 10) -> dict[str, Any]:
    """within: images that repeat an earlier one of their split; across: images of the second split that the first has."""
    where = [(split, len(s.marks)) for split, s in seen.items()]
    _, kind, counts = np.unique([mark for s in seen.values() for mark in s.marks], return_inverse=True, return_counts=True)
    starts = np.cumsum([0, *(n for _, n in where)])
    places: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for at in np.flatnonzero(counts[kind] > 1).tolist():  # few of many
        home = int(np.searchsorted(starts, at, "right")) - 1
        places[int(kind[at])].append((where[home][0], at - int(starts[home])))
    groups = list(places.values())
    within, across, mixed = dict.fromkeys(seen, 0), {f"{a}-{b}": 0 for a, b in combinations(seen, 2)}, 0
    for group in groups:
        number = {split: sum(home == split for home, _ in group) for split in seen}
        for split, n in number.items():
            within[split] += max(0, n - 1)
        for a, b in combinations(seen, 2):
            across[f"{a}-{b}"] += number[b] if number[a] else 0
        mixed += len({int(labels[split][i]) for split, i in group}) > 1
    first = [[f"{split}: {seen[split].names[i]}" for split, i in group] for group in groups[:most]]
    return {"within": within, "across": across, "groups": len(groups), "of_different_classes": mixed, "first": first}


def as_text(report: Mapping[str, Any]) -> str:
    splits, sizes, twins = list(report["counts"]), report["native_sizes"], report["duplicates"]
    width = max(5, *(len(row["name"]) for row in report["classes"]))
    lines = [f"{report['name']}: {', '.join(f'{n} {split}' for split, n in report['counts'].items())} images", ""]
    lines += [f"{'class':{width}}" + "".join(f"{split:>8}" for split in splits)]
    lines += [f"{row['name']:{width}}" + "".join(f"{row[split]:8}" for split in splits) for row in report["classes"]]
    lines += ["", "size before resizing (smallest, median, largest), pixels"]
    lines += [f"  {side:6} {', '.join(map(str, values))}" for side, values in sizes.items()]
    lines += ["", f"unreadable and dropped: {report['dropped']}", *(f"  {line}" for line in report["unreadable"])]
    lines += ["", "duplicates (equal pixels)"]
    lines += [f"  {n} of {split} repeat another one of {split}" for split, n in twins["within"].items()]
    lines += [f"  {n} of {pair.split('-')[1]} are in {pair.split('-')[0]} too" for pair, n in twins["across"].items()]
    lines += [f"  {twins['of_different_classes']} pictures are there under more than one class"]
    lines += [f"  {' = '.join(group)}" for group in twins["first"]]
    if twins["groups"] > len(twins["first"]):
        lines += [f"  and {twins['groups'] - len(twins['first'])} more"]
    return "\n".join(lines) + "\n"


def contact_sheet(path: Path, classes: list[str], splits: Mapping[str, Split]) -> None:
    """A row per class: its first training images, then its first test images, as the networks get them."""
    from pupil.figures import canvas

    rows = sorted({round(i * (len(classes) - 1) / (SHEET_CLASSES - 1)) for i in range(SHEET_CLASSES)})
    size = splits["train"].pixels.shape[-1]
    step = size + max(1, size // 16)
    train, test = (mosaic(splits[name], rows, n, step) for name, n in (("train", SHEET_TRAIN), ("test", SHEET_TEST)))
    width, height = 1.7 + 0.55 * (SHEET_TRAIN + SHEET_TEST + 0.5), 0.4 + 0.55 * len(rows)
    figure, (axes,) = canvas(width, height, 1, layout=None)
    figure.subplots_adjust(1.6 / width, 0, 1, 1 - 0.35 / height)
    gap = torch.full((train.shape[0], step // 2, 3), 255, dtype=torch.uint8)
    axes.imshow(torch.cat([train, gap, test], 1).numpy(), interpolation="nearest" if step < 55 else "antialiased")
    axes.set_yticks(
        [step * i + size / 2 for i in range(len(rows))], [classes[k][:24] for k in rows], fontsize=7, parse_math=False
    )
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    axes.text(0, -step / 8, "train", fontsize=8)
    axes.text(SHEET_TRAIN * step + step // 2, -step / 8, "test", fontsize=8)
    if len(rows) < len(classes):
        axes.text(2 * step, -step / 8, f"{len(rows)} of {len(classes)} classes", fontsize=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class name in letters that the font lacks
        figure.savefig(path, metadata={"Software": None})


def mosaic(split: Split, rows: list[int], columns: int, step: int) -> Tensor:
    """(step * rows, step * columns, 3) uint8, white where a class has fewer images."""
    sheet = torch.full((len(rows), columns, 3, step, step), 255, dtype=torch.uint8)
    size = split.pixels.shape[-1]
    for r, k in enumerate(rows):
        first = (split.labels == k).nonzero().flatten()[:columns]
        sheet[r, : len(first), :, :size, :size] = split.pixels.read(first)
    return sheet.permute(0, 3, 1, 4, 2).reshape(len(rows) * step, columns * step, 3)
