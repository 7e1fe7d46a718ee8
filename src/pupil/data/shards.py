"""WebDataset shards: a folder of .tar files, or one of them, whose images are read in place and never unpacked.

Splits are the shards in folders `train`, `val` (or `validation`) and `test`, or with these words in their names
(imagenet1k-validation-00.tar); `val` and `test` mean what they mean for data.name=folder.  Numbers are labels 0..K-1,
named by the lines of a classes.txt or classnames.txt beside the shards where there is one; names are classes in their
order.
"""

import hashlib
import os
import re
from array import array
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from pupil.data.base import Content, Data, Pool
from pupil.data.decode import pool_of_files
from pupil.data.folder import SPLIT_NAMES
from pupil.data.limits import fits, walk
from pupil.data.samples import Label, samples
from pupil.data.tar import Reader, read_at
from pupil.types import UserError

SPLITS = {name: name for name in ("train", "val", "test")} | SPLIT_NAMES
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4")
CLASS_LISTS = ("classes.txt", "classnames.txt")
MOST_LIST = 1 << 24  # bytes of a list of classes


class Found(NamedTuple):
    about: str  # the setting that named them
    path: Path
    shards: list[str]  # relative to `path`, sorted
    lists: list[str]  # of classes


class Index(NamedTuple):
    """Where the images of a split are."""

    shards: list[Path]
    names: list[str]  # of each image, with its shard's
    shard: array  # of each image, its position in `shards`
    start: array
    size: array
    code: array  # of each image, the position of its label in `labels`
    labels: dict[Label, str]  # each label that there is, and the first image that has it
    fingerprint: str  # SHA-256 of names, sizes and labels


def shards(config: Data) -> Content:
    if config.path is None:
        raise UserError("data.path is not given: data.name=shards reads the .tar files of a folder; set data.path to it")
    found = find_shards("data.path", config.path)
    splits = {name: (found, part) for name, part in split(found).items()}
    if config.test_path is not None:
        if "test" in splits:
            raise UserError(
                f"data.test_path is {config.test_path!r}, but {config.path} has test images of its own "
                f"({splits['test'][1][0]}); leave one of them out"
            )
        test = find_shards("data.test_path", config.test_path)
        splits["test"] = (test, test.shards)
    elif "test" not in splits and "val" in splits:
        splits["test"] = splits.pop("val")
    indices = {name: index(*part) for name, part in splits.items()}
    order, names = classes(found, indices["train"].labels)
    for name, (place, _) in splits.items():
        check_same_labels(name, place, indices[name].labels, order)
    pools = {name: pool_of(one, order, config) for name, one in indices.items()}
    prints = "\n".join([*names, *(f"{name} {one.fingerprint}" for name, one in sorted(indices.items()))])
    fingerprint = hashlib.sha256(prints.encode()).hexdigest()
    return Content(names, pools["train"], pools.get("val"), pools.get("test"), fingerprint=fingerprint)


def find_shards(key: str, given: str) -> Found:
    path, about = Path(given).expanduser(), f"{key} is {given!r}"
    if path.is_dir():
        names = sorted(name for name, _ in walk(about, path, (".tar", *PACKED, *CLASS_LISTS)) if not name.endswith("/"))
    elif path.is_file():
        names, path = [path.name, *(name for name in CLASS_LISTS if (path.parent / name).is_file())], path.parent
    else:
        raise UserError(f"{about}: there is no such folder or .tar file; correct the path")
    packed = [name for name in names if name.lower().endswith(PACKED)]
    if packed:
        raise UserError(f"{about}: {packed[0]} is compressed, so that no image can be read in place; unpack it to a .tar")
    tars = [name for name in names if name.lower().endswith(".tar")]
    if not tars:
        raise UserError(f"{about}: no .tar file is there; data.name=shards reads WebDataset shards, data.name=folder images")
    return Found(about, path, tars, [name for name in names if name.rpartition("/")[2] in CLASS_LISTS])


def split(found: Found) -> dict[str, list[str]]:
    """All are for training where they are of one split or of none."""
    parts: dict[str, list[str]] = {}
    for name in found.shards:
        *folders, file = name.lower().removesuffix(".tar").split("/")
        words = {SPLITS[word] for word in (*folders, *re.findall("[a-z]+", file)) if word in SPLITS}
        if len(words) > 1:
            raise UserError(f"{found.about}: the name {name} says {' and '.join(sorted(words))}; rename it to say one of them")
        parts.setdefault("".join(words), []).append(name)
    if len(parts) == 1:
        return {"train": found.shards}
    if "" in parts:
        other = next(name for name in found.shards if name not in parts[""])
        raise UserError(f"{found.about}: {parts[''][0]} says no split in its name or folder, {other} does; rename or remove it")
    if "train" not in parts:
        raise UserError(f"{found.about}: shards of {' and '.join(sorted(parts))}, none of train; add them, or give one split")
    return parts


def index(found: Found, names: list[str]) -> Index:
    one = Index([found.path / name for name in names], [], array("i"), array("q"), array("q"), array("i"), {}, "")
    digest, codes = hashlib.sha256(), {}
    for number, (name, path) in enumerate(zip(names, one.shards, strict=True)):
        about = f"{found.about}: {name}"
        try:
            with Reader(path) as reader:
                for sample in samples(about, reader):
                    digest.update(f"{name}/{sample.name}\t{sample.size}\t{sample.label!r}\n".encode())
                    one.names.append(f"{name}/{sample.name}")
                    one.shard.append(number)
                    one.start.append(sample.start)
                    one.size.append(sample.size)
                    one.code.append(codes.setdefault(sample.label, len(codes)))
                    if len(codes) > len(one.labels):
                        one.labels[sample.label] = one.names[-1]
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(f"{about}: {' '.join(str(error).split())}") from None
    if not one.names:
        raise UserError(
            f"{found.about}: no image is in {names[0]}{', ...' if len(names) > 1 else ''}; give shards that hold some"
        )
    return one._replace(fingerprint=digest.hexdigest())


def classes(found: Found, labels: dict[Label, str]) -> tuple[dict[Label, int], tuple[str, ...]]:
    """The index of each label that may be, and the names."""
    numbers = {label: name for label, name in labels.items() if isinstance(label, int)}
    words = {label: name for label, name in labels.items() if isinstance(label, str)}
    if numbers and words:
        (number, here), (word, there) = next(iter(numbers.items())), next(iter(words.items()))
        raise UserError(
            f"{found.about}: the label of {here} is the number {number}, of {there} the name {word!r}; use one kind for all"
        )
    listed = listed_classes(found)
    if words:
        names = listed or tuple(sorted(words))
        order: dict[Label, int] = {name: k for k, name in enumerate(names)}
        if len(order) < len(names):
            raise UserError(f"{found.about}: {found.lists[0]} names a class twice; name each once")
    else:
        names = tuple(f"{name} ({k})" if listed.count(name) > 1 else name for k, name in enumerate(listed))
        names = names or tuple(map(str, range(len(numbers))))
        order = {k: k for k in range(len(names))}
    strange = next((label for label in labels if label not in order), None)
    if strange is not None:
        raise UserError(f"{found.about}: {wrong_label(strange, labels, names, found.lists)}")
    if len(names) < 2:
        raise UserError(f"{found.about}: one class ({', '.join(names)}); images of 2 classes or more are needed")
    return order, names


def wrong_label(strange: Label, labels: dict[Label, str], names: tuple[str, ...], lists: list[str]) -> str:
    what = f"the label of {labels[strange]} is {strange!r}"
    if lists:
        return f"{what}, which is none of the {len(names)} classes of {lists[0]}; name every class there, a line each"
    if isinstance(strange, int) and strange < 0:
        return f"{what}; classes are numbered from 0: leave the image out or correct it"
    missing = next(k for k in range(len(names)) if k not in labels)
    return (
        f"{what}, but none is {missing}: {len(names)} classes are numbered 0 to {len(names) - 1}; number them so, or name them "
        "all in a classes.txt beside the shards"
    )


def listed_classes(found: Found) -> tuple[str, ...]:
    """The lines of the list of classes; none without a list."""
    texts = {name: read_list(found, name) for name in found.lists}
    if len(set(texts.values())) > 1:
        raise UserError(f"{found.about}: {' and '.join(texts)} name other classes; keep one of them")
    return next(iter(texts.values()), ())


def read_list(found: Found, name: str) -> tuple[str, ...]:
    try:
        fits_list = (found.path / name).stat().st_size <= MOST_LIST
        lines = (found.path / name).read_text("utf-8").rstrip().split("\n") if fits_list else [""]
    except (OSError, ValueError) as error:
        raise UserError(f"{found.about}: cannot read {name} ({error}); correct or remove it") from None
    names = tuple(line.strip() for line in lines)
    if not all(line and line.isprintable() for line in names):
        raise UserError(f"{found.about}: {name} must have the name of a class in each line, and nothing else; correct it")
    return names


def check_same_labels(name: str, place: Found, labels: dict[Label, str], order: dict[Label, int]) -> None:
    strange = [label for label in labels if label not in order]
    if strange:
        raise UserError(
            f"{place.about}: the label of {labels[strange[0]]} is {strange[0]!r}, which no training image has; "
            f"the {name} images must be of the classes of the training images"
        )


def pool_of(one: Index, order: dict[Label, int], config: Data) -> Pool:
    table = torch.tensor([order[label] for label in one.labels], dtype=torch.int64)
    labels = table[torch.tensor(one.code, dtype=torch.int64)]
    return pool_of_files(partial(opener, one), range(len(one.names)), one.names, labels, config)


def opener(one: Index) -> Callable[[int], bytes]:
    """A function from an image's position to its bytes, for any thread."""

    def fetch(i: int) -> bytes:
        fits(one.names[i], one.size[i])
        file = os.open(one.shards[one.shard[i]], os.O_RDONLY)
        try:
            raw = read_at(file, one.start[i], one.size[i])
        finally:
            os.close(file)
        if len(raw) < one.size[i]:
            raise EOFError("its shard became shorter after it was listed")
        return raw

    return fetch


def some_sizes(config: Data, most: int) -> list[int]:
    """Bytes of the first images, at most so many."""
    found = find_shards("data.path", config.path or "")
    with Reader(found.path / found.shards[0]) as reader:
        return [sample.size for sample in islice(samples(found.about, reader), most)]
