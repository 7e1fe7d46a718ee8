"""Any source -> one folder of few large files, the same bytes for the same settings.

train.safetensors, val.safetensors, test.safetensors
    images (N, 3, S, S) uint8, labels (N,) int64, source_ids (N,) int64: position in the source's split; for random resized
    crops train.safetensors holds the images as encoded files instead (pupil.data.encoded), val and test as they are evaluated
teacher/
    the same files of the teachers' classes, where they have others; their images come from the same draw, so that no
    image is for training in one folder and for validation or testing in the other
manifest.json
    classes, sizes, mean and std, augmentation, hashes and the settings it was prepared with
report.json, report.txt, contact_sheet.png
    for people; see pupil.data.report.  `load` does not read them
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from pupil.data.augment import Augment
from pupil.data.base import Data
from pupil.data.classes import class_sets, labelling
from pupil.data.draw import draw
from pupil.data.files import open_split, sha256
from pupil.data.gather import Gathered, Progress, read
from pupil.data.manifest import VERSION, digest
from pupil.data.manifest import read as read_manifest
from pupil.data.report import write_report
from pupil.data.sources import SOURCES
from pupil.data.unchanged import Stamp, refuse_changed, stamp
from pupil.sealed import write_sealed
from pupil.types import UserError

SPLITS = ("train", "val", "test")
REBUILD = "prepare it again: dvc repro prepare"
TEACHER = "teacher"  # the folder of the teachers' own classes
FILES = ("manifest.json", *(f"{name}.safetensors" for name in SPLITS))


Moments = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation per channel, in units of 0..1


class Prepared(NamedTuple):
    manifest: dict[str, Any]
    splits: dict[str, tuple[Any, Tensor]]  # images (N, 3, H, W) uint8, mapped from the file (or Shown); labels (N,) int64
    pixels: dict[str, Any]  # the same images, to be read in parts: Pixels (or Encoded)
    stamps: dict[Path, Stamp]  # of their files, when they were checked

    def refuse_changed(self) -> None:
        """What a training reads must stay what it was when it began."""
        refuse_changed(self.stamps, {self.pixels[name].path: self.manifest["sha256"][name] for name in self.pixels})


def silent(done: int, total: int) -> None:
    """No progress."""


def prepare(config: Data, out: Path, progress: Progress = silent) -> dict[str, Any]:
    """Write the folder `out`, replacing what an earlier call wrote; its manifest.  After an error `out` is as it was."""
    check(config)
    check_place(out)
    source, given = SOURCES[config.name], config
    config = replace(config, crop=recipe(config).crop)
    content = source.load(config)
    if config.crop == "resized" and content.train.names is None:
        raise UserError(f"data.crop is 'resized', which needs image files: {config.name} comes as pixels of one size; use pad")
    if source.classes not in (None, len(content.classes)):
        raise UserError(
            f"{config.name} has {source.classes} classes, {config.path} has {len(content.classes)}: fetch what is missing, "
            "or use data.name=folder for a part of it"
        )
    sets = class_sets(config, content.classes)
    ours = labelling(sets.student, sets, content.classes, config.relabel)
    theirs = labelling(sets.teacher, sets, content.classes) if sets.apart else None
    drawn = draw(config, content, sets.union)
    folders = {"": ours} | ({} if theirs is None else {TEACHER: theirs})
    with replacing(out, folders) as new:
        check_disk(sum(len(d.ids) for d in drawn.values()) * len(folders), config.image_size, new)
        reading = read(config, content, drawn, sets.union, folders, new, progress)
        moments = source.statistics or statistics(reading.levels)
        shared = {"source_splits": {name: d.home for name, d in drawn.items()}, "dropped": len(reading.unreadable)}
        beside = {"fingerprint": content.fingerprint, "config": asdict(given), "unreadable": reading.unreadable}
        beside |= {"teacher_classes": None if theirs is None else theirs.names}
        if config.relabel == "cskd":
            beside |= {"unmerged": [content.classes[k] for k in sets.student]}  # the class that a label stands for
        manifests = {}
        for folder, mine in folders.items():
            found = reading.folders[folder]
            facts = describe(config, mine.names, found, moments) | shared
            manifest = json.loads(json.dumps({**facts, "digest": digest(facts), **beside}))
            write_sealed(new / folder / "manifest.json", manifest)
            splits = {name: open_split(new / folder / f"{name}.safetensors") for name in found}
            write_report(new / folder, manifest, splits, {name: part.seen for name, part in found.items()})
            manifests[folder] = manifest
    return manifests[""]


def load(folder: Path) -> Prepared:
    """What `prepare` wrote."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} holds no prepared data ({missing[0]} is missing); {REBUILD}")
    stamps = {path: stamp(path) for path in (folder / f"{name}.safetensors" for name in SPLITS)}  # before they are hashed
    try:
        manifest = read_manifest(folder / "manifest.json")
        found = {name: open_split(folder / f"{name}.safetensors") for name in SPLITS}
    except ValueError as error:
        raise UserError(f"{folder} is damaged ({error}); delete it and {REBUILD}") from error
    if manifest["version"] != VERSION:
        raise UserError(f"{folder} was prepared in format {manifest['version']}, this is {VERSION}; {REBUILD}")
    for name in SPLITS:
        if sha256(folder / f"{name}.safetensors") != manifest["sha256"].get(name):
            raise UserError(
                f"{folder / name}.safetensors is damaged: its SHA-256 is not that of manifest.json; delete {folder} and"
                f" {REBUILD}"
            )
    splits = {name: (split.images, split.labels) for name, split in found.items()}
    return Prepared(manifest, splits, {name: split.pixels for name, split in found.items()}, stamps)


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
    if config.relabel not in ("right", "cskd"):
        raise UserError(f"data.relabel is {config.relabel!r}: right, or cskd for the merged classes of CSKD's code")
    if config.relabel == "cskd" and config.classes is None:
        raise UserError("data.relabel=cskd renumbers the classes of data.classes, which is not given; give it or use right")
    if isinstance(config.teacher_classes, str) and config.teacher_classes != "all":
        raise UserError(f"data.teacher_classes is {config.teacher_classes!r}: all, a number, or a list such as [0, 1]")
    if config.overlap is not None and not 0 <= config.overlap <= 1:
        raise UserError(f"data.overlap is {config.overlap:g}: the share of the students' classes that teachers know, 0 to 1")
    if config.unreadable not in ("stop", "drop"):
        raise UserError(f"data.unreadable is {config.unreadable!r}: stop or drop")
    if (config.folds is None) != (config.fold is None):
        raise UserError("data.folds and data.fold go together: into how many parts, and which of them, 0.., is for validation")
    if config.folds is not None and config.fold is not None and config.fold >= config.folds:
        raise UserError(f"data.fold is {config.fold} of {config.folds}: folds are 0 to {config.folds - 1}")
    if config.crop not in (None, "pad", "resized"):
        raise UserError(f"data.crop is {config.crop!r}: pad (crops after padding) or resized (random resized crops)")
    if config.pad and config.crop == "resized":
        raise UserError(f"data.pad is {config.pad}, which random resized crops do not have; leave it out, or use data.crop=pad")
    for key, most in (("scale", 1.0), ("ratio", math.inf)):
        ends = getattr(config, key)
        if ends is not None and not (len(ends) == 2 and 0 < ends[0] <= ends[1] <= most):
            raise UserError(
                f"data.{key} is {list(ends)}: from and to, such as {list(Augment._field_defaults[key])}, are needed"
            )
        if ends is not None and config.name in SOURCES and recipe(config).crop != "resized":
            raise UserError(
                f"data.{key} is of random resized crops, and these are padded; leave it out, or use data.crop=resized"
            )
    for a, b in (
        ("per_class", "train_images"),
        ("folds", "val_images"),
        ("overlap", "classes"),
        ("overlap", "teacher_classes"),
    ):
        if getattr(config, a) is not None and getattr(config, b) is not None:
            raise UserError(
                f"data.{a} and data.{b} are both given ({getattr(config, a)}, {getattr(config, b)}); give one of them"
            )
    if config.test_path is not None and config.name not in ("folder", "shards"):
        raise UserError(
            f"data.test_path is {config.test_path!r}: only data.name=folder or shards reads it, not {config.name}; leave it out"
        )


def recipe(config: Data) -> Augment:
    """The source's own, but for what is given; a padding asks for padded crops."""
    own = SOURCES[config.name].augment
    crop = config.crop or ("pad" if config.pad else own.crop)
    pad, flip = own.pad if config.pad is None else config.pad, own.flip if config.flip is None else config.flip
    return Augment(0 if crop == "resized" else pad, flip, crop, config.scale or own.scale, config.ratio or own.ratio)


def check_place(out: Path) -> None:
    foreign = out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / "manifest.json").exists()))
    if foreign:
        raise UserError(f"{out} is there and holds something else than prepared data; give another folder or move it away")


def check_disk(images: int, size: int, folder: Path) -> None:
    need, free = images * 3 * size * size, shutil.disk_usage(folder).free
    if need > 0.95 * free:
        raise UserError(
            f"{images} images of {size} x {size} pixels need {need / 1e9:.1f} GB, the disk of {folder.parent.absolute()} "
            f"has {free / 1e9:.1f} GB left; make room, or lower data.image_size or data.train_images"
        )


def describe(config: Data, classes: list[str], found: dict[str, Gathered], moments: Moments) -> dict[str, Any]:
    """What the digest covers: all that decides the numbers a network sees, and no path."""
    mean, std = moments
    return {
        "version": VERSION,
        "name": config.name,
        "classes": classes,
        "image_size": config.image_size,
        "counts": {name: len(part.labels) for name, part in found.items()},
        "class_counts": {name: part.labels.bincount(minlength=len(classes)).tolist() for name, part in found.items()},
        "mean": mean,
        "std": std,
        "augment": {
            k: v for k, v in recipe(config)._asdict().items() if config.crop == "resized" or k in ("pad", "flip", "crop")
        },
        "sha256": {name: part.sha256 for name, part in found.items()},
    }


def statistics(levels: Tensor) -> Moments:
    """(3, 256) counts of each value -> mean and standard deviation per channel in units of 0..1; std is 0.001 or more.

    Computed in integers: the same bits on every machine.
    """
    mean, std = [], []
    for channel in levels.tolist():
        n, first, second = (sum(count * value**power for value, count in enumerate(channel)) for power in (0, 1, 2))
        mean.append(first / (255 * n))
        std.append(max(1e-3, math.sqrt((n * second - first**2) / (255 * n) ** 2)))
    return tuple(mean), tuple(std)


@contextmanager
def replacing(out: Path, folders: Mapping[str, Any]) -> Iterator[Path]:
    """A folder beside `out` that takes its place at the end: no half-written folder is ever there."""
    new = out.with_name(f"{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        for folder in folders:
            (new / folder).mkdir(parents=True)
        yield new
        if out.exists():
            shutil.rmtree(out)
        new.rename(out)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        with suppress(OSError):  # another run may be in it by now
            for folder in made:
                folder.rmdir()
        raise
