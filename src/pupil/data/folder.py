"""Your own images: a folder or a .zip file with one folder per class, read in place.

Splits are folders `train` and `test` (or `val` where there is no `test`; with both, `val` is the validation split), or
`test_path`, or drawn.  A wrapping folder is skipped.  Classes are in the order of their names; files below a class count
at any depth; hidden files and files that are no images by their name are left out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pupil.data.base import Content, Data, Pool
from pupil.data.decode import as_pool
from pupil.data.tree import Tree, list_tree
from pupil.types import UserError

SPLIT_NAMES = {"valid": "val", "validation": "val", "train_set": "train", "test_set": "test"}


class Split(NamedTuple):
    tree: Tree
    prefix: str  # "", or the folder that holds the class folders, with a slash at its end


def folder(config: Data) -> Content:
    if config.path is None:
        raise UserError("data.path is not given: data.name=folder reads the images of a folder or .zip; set data.path to it")
    splits = find_splits(list_tree("data.path", config.path))
    if config.test_path is not None:
        if "test" in splits:
            raise UserError(
                f"data.test_path is {config.test_path!r}, but {config.path} has test images of its own "
                f"({splits['test'].prefix}); leave one of them out"
            )
        tree = list_tree("data.test_path", config.test_path)
        splits["test"] = Split(tree, skip_wrapping(tree))
    elif "test" not in splits and "val" in splits:
        splits["test"] = splits.pop("val")
    return content_of(splits, config)


def content_of(splits: dict[str, Split], config: Data) -> Content:
    """Class folders below each split's prefix; all splits have the classes of `train`."""
    classes = class_folders(splits["train"])
    if len(classes) < 2:
        raise UserError(no_classes(splits["train"], classes))
    for name, split in splits.items():
        check_same_classes(name, classes, class_folders(split), split)
    pools = {name: pool_of(split, classes, config) for name, split in splits.items()}
    prints = " ".join(dict.fromkeys(split.tree.fingerprint for split in splits.values()))
    return Content(classes, pools["train"], pools.get("val"), pools.get("test"), fingerprint=prints)


def find_splits(tree: Tree) -> dict[str, Split]:
    """`train`, and `test` and `val` where folders of these names are beside it."""
    prefix = skip_wrapping(tree)
    below = {SPLIT_NAMES.get(name.lower(), name.lower()): Split(tree, f"{prefix}{name}/") for name in children(tree, prefix)}
    found = {name: below[name] for name in ("train", "val", "test") if name in below}
    return found if "train" in found and len(found) > 1 else {"train": Split(tree, prefix)}


def skip_wrapping(tree: Tree) -> str:
    prefix = ""
    while len(below := children(tree, prefix)) == 1 and children(tree, f"{prefix}{below[0]}/"):
        prefix += f"{below[0]}/"
    return prefix


def children(tree: Tree, prefix: str) -> list[str]:
    """Names of the folders directly below, sorted."""
    names = (name[len(prefix) :] for name in tree.folders if name.startswith(prefix))
    return sorted(name for name in names if "/" not in name)


def class_folders(split: Split) -> tuple[str, ...]:
    return tuple(children(*split))


def no_classes(split: Split, classes: tuple[str, ...]) -> str:
    tree, prefix = split
    loose = sum(name.startswith(prefix) and "/" not in name[len(prefix) :] for name in tree.files)
    found = f"one class folder ({classes[0]})" if classes else "no class folders"
    found += f" and {loose} images outside them" if loose else ""
    return f"data.path {tree.path}: {found}; a folder for each of 2 classes or more is needed, with its images inside"


def check_same_classes(name: str, wanted: tuple[str, ...], found: tuple[str, ...], split: Split) -> None:
    if found == wanted:
        return
    lacks, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    what = [
        f"{verb} {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for verb, names in (("lack", lacks), ("add", extra))
        if names
    ]
    where = f"{split.tree.path}/{split.prefix}".rstrip("/")
    raise UserError(
        f"the {name} images in {where} {' and '.join(what)}: their class folders must be those of the training images"
    )


def pool_of(split: Split, classes: Sequence[str], config: Data) -> Pool:
    tree, prefix = split
    index = {name: i for i, name in enumerate(classes)}
    files = [name for name in tree.files if name.startswith(prefix) and "/" in name[len(prefix) :]]
    labels = torch.tensor([index[name[len(prefix) :].split("/")[0]] for name in files], dtype=torch.int64)
    return as_pool(tree, files, labels, config)
