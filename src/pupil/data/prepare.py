"""Any source -> one folder of few large files, the same bytes for the same settings.

train.safetensors, val.safetensors, test.safetensors
    images (N, 3, S, S) uint8, labels (N,) int64, source_ids (N,) int64: position in the source's split
manifest.json
    classes, sizes, mean and std, augmentation, hashes and the settings it was prepared with
report.json, report.txt, contact_sheet.png
    for people; see pupil.data.report.  `load` does not read them
"""

import hashlib
import json
import math
import os
import shutil
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pupil.arrays import save_arrays
from pupil.data.base import Data, Source
from pupil.data.draw import class_indices, draw
from pupil.data.gather import Arrays, Progress, drop, read, told
from pupil.data.report import Seen, write_report
from pupil.data.sources import SOURCES
from pupil.types import UserError

VERSION = 1
SPLITS = ("train", "val", "test")
FILES = ("manifest.json", *(f"{name}.safetensors" for name in SPLITS))


class Prepared(NamedTuple):
    manifest: dict[str, Any]
    splits: dict[str, tuple[Tensor, Tensor]]  # images (N, 3, H, W) uint8, labels (N,) int64


def silent(done: int, total: int) -> None:
    """No progress."""


def prepare(config: Data, out: Path, progress: Progress = silent) -> dict[str, Any]:
    """Write the folder `out`, replacing what an earlier call wrote; its manifest.  After an error `out` is as it was."""
    check(config)
    check_place(out)
    source = SOURCES[config.name]
    content = source.load(config)
    if source.classes not in (None, len(content.classes)):
        raise UserError(
            f"{config.name} has {source.classes} classes, {config.path} has {len(content.classes)}: fetch what is missing, "
            "or use data.name=folder for a part of it"
        )
    chosen = class_indices(config, content.classes)
    drawn = draw(config, content, chosen)
    check_memory(sum(len(d.ids) for d in drawn.values()), config.image_size)
    names = [content.classes[k] for k in chosen]
    splits, seen = read(content, drawn, chosen, progress)
    unreadable = [f"{s.names[i]} ({reason})" for s in seen.values() for i, reason in s.unreadable.items()]
    if unreadable:
        if config.unreadable == "stop":
            raise UserError(
                f"cannot read {told(unreadable)}; mend or remove what is damaged, or leave it out with data.unreadable=drop"
            )
        splits, seen = drop(splits, seen, names)
    facts = describe(config, source, names, splits)
    facts |= {"source_splits": {name: d.home for name, d in drawn.items()}, "dropped": len(unreadable)}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    manifest = {**facts, "digest": digest, "fingerprint": content.fingerprint, "config": asdict(config)}
    manifest = json.loads(json.dumps({**manifest, "unreadable": unreadable}))
    write(out, manifest, splits, seen)
    return manifest


def load(folder: Path) -> Prepared:
    """What `prepare` wrote."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} holds no prepared data ({missing[0]} is missing); prepare it")
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        found = {name: load_file(folder / f"{name}.safetensors") for name in SPLITS}
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{folder} is damaged ({error}); delete it and prepare it again") from error
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        found_version = manifest.get("version") if isinstance(manifest, dict) else None
        raise UserError(f"{folder} was prepared in format {found_version}, this is {VERSION}; prepare it again")
    for name, arrays in found.items():
        if sha256(arrays) != manifest["sha256"][name]:
            raise UserError(
                f"{folder / name}.safetensors is damaged: its SHA-256 is not that of manifest.json; prepare it again"
            )
    return Prepared(manifest, {name: (arrays["images"], arrays["labels"]) for name, arrays in found.items()})


def check(config: Data) -> None:
    """What is wrong whatever the source holds."""
    if config.name not in SOURCES:
        near = get_close_matches(config.name, SOURCES, 1)
        hint = f"did you mean {near[0]!r}?" if near else "choose one of them"
        raise UserError(f"data.name is {config.name!r}, known are {', '.join(SOURCES)}; {hint}")
    for key, least in (("image_size", 8), ("pad", 0), ("per_class", 1), ("folds", 2), ("fold", 0)):
        value = getattr(config, key)
        if value is not None and value < least:
            raise UserError(f"data.{key} is {value}: {least} or more are needed")
    if config.unreadable not in ("stop", "drop"):
        raise UserError(f"data.unreadable is {config.unreadable!r}: stop or drop")
    if (config.folds is None) != (config.fold is None):
        raise UserError("data.folds and data.fold go together: into how many parts, and which of them, 0.., is for validation")
    if config.folds is not None and config.fold is not None and config.fold >= config.folds:
        raise UserError(f"data.fold is {config.fold} of {config.folds}: folds are 0 to {config.folds - 1}")
    for a, b in (("per_class", "train_images"), ("per_class", "folds"), ("folds", "val_images")):
        if getattr(config, a) is not None and getattr(config, b) is not None:
            raise UserError(
                f"data.{a} and data.{b} are both given ({getattr(config, a)}, {getattr(config, b)}); give one of them"
            )
    if config.test_path is not None and config.name != "folder":
        raise UserError(
            f"data.test_path is {config.test_path!r}: only data.name=folder reads it, not {config.name}; leave it out"
        )


def check_place(out: Path) -> None:
    foreign = out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / "manifest.json").exists()))
    if foreign:
        raise UserError(f"{out} is there and holds something else than prepared data; give another folder or move it away")


def check_memory(images: int, size: int) -> None:
    need, free = images * 3 * size * size, available_memory()
    if need > 0.8 * free:
        raise UserError(
            f"{images} images of {size} x {size} pixels need {need / 1e9:.1f} GB of memory, more than 80 % of the "
            f"{free / 1e9:.1f} GB available; lower data.image_size or data.train_images"
        )


def available_memory() -> int:
    """Bytes.  Linux's own estimate, which counts the file cache as free; elsewhere all there is."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def describe(config: Data, source: Source, classes: list[str], splits: dict[str, Arrays]) -> dict[str, Any]:
    """What the digest covers: all that decides the numbers a network sees, and no path."""
    mean, std = source.statistics or statistics(splits["train"]["images"])
    pad, flip = source.augment
    return {
        "version": VERSION,
        "name": config.name,
        "classes": classes,
        "image_size": config.image_size,
        "counts": {name: len(a["labels"]) for name, a in splits.items()},
        "class_counts": {name: a["labels"].bincount(minlength=len(classes)).tolist() for name, a in splits.items()},
        "mean": mean,
        "std": std,
        "augment": {"pad": pad if config.pad is None else config.pad, "flip": flip if config.flip is None else config.flip},
        "sha256": {name: sha256(arrays) for name, arrays in splits.items()},
    }


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel in units of 0..1; std is 0.001 or more.

    Computed in integers from histograms: the same bits on every machine.
    """
    counts = torch.zeros(3, 256, dtype=torch.int64)
    for block in images.split(4096):
        counts += torch.stack([block[:, c].flatten().bincount(minlength=256) for c in range(3)])
    mean, std = [], []
    for channel in counts.tolist():
        n, first, second = (sum(count * value**power for value, count in enumerate(channel)) for power in (0, 1, 2))
        mean.append(first / (255 * n))
        std.append(max(1e-3, math.sqrt((n * second - first**2) / (255 * n) ** 2)))
    return tuple(mean), tuple(std)


def sha256(arrays: Arrays) -> str:
    """Of the tensors' bytes: images, labels, source_ids."""
    digest = hashlib.sha256()
    for name in ("images", "labels", "source_ids"):
        digest.update(arrays[name].flatten().numpy().data)
    return digest.hexdigest()


def write(out: Path, manifest: dict[str, Any], splits: dict[str, Arrays], seen: dict[str, Seen]) -> None:
    """Beside `out` first, then renamed: no half-written folder is ever there."""
    new = out.with_name(f"{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        about = new / "manifest.json"
        about.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        for name, arrays in splits.items():
            save_arrays(new / f"{name}.safetensors", arrays)
        write_report(new, manifest, splits, seen)
        if out.exists():
            shutil.rmtree(out)
        new.rename(out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
