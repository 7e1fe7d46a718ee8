"""Which images go to which split: stratified draws, all by one seed.

Of each class the images are put in a random order once; test takes the first, val the next, train what follows.  So a
change of `train_images` alone leaves val and test as they are, and a smaller training set is a part of a larger one.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pupil.data.base import Content, Data, Pool
from pupil.types import UserError


class Drawn(NamedTuple):
    home: str  # the source's split: train | val | test
    ids: Tensor  # (n,) int64, ascending positions in it


def draw(config: Data, content: Content, chosen: list[int]) -> dict[str, Drawn]:
    """For train, val and test the images drawn; disjoint, every class in each."""
    pools = {"test": content.test, "val": content.val, "train": content.train}
    held_out = [name for name, pool in pools.items() if pool is None]
    if config.folds is not None and content.val is not None:
        raise UserError(f"data.folds is {config.folds}, but {config.name} has validation images of its own; leave folds out")
    generator = torch.Generator().manual_seed(config.seed)
    drawn = {}
    for home, pool in pools.items():
        if pool is None:
            continue
        parts = [*held_out, "train"] if home == "train" else [home]
        members = shuffled_members(pool, chosen, generator)
        need = sum(least_per_class(config, name) for name in parts)
        for k, ids in zip(chosen, members, strict=True):
            if len(ids) < need:
                raise UserError(
                    f"class {content.classes[k]!r} has {len(ids)} images for {' and '.join(parts)}: {need} or more are "
                    f"needed; add images of it to {home} or choose the other classes with data.classes"
                )
        if home == "train" and config.folds is not None:
            dealt = deal_folds(config, members, parts, config.folds)
        else:
            sizes = split_sizes(config, parts, sum(map(len, members)), len(chosen), content.rest_is_test)
            dealt = deal(config, members, parts, sizes)
        drawn |= {name: Drawn(home, ids) for name, ids in zip(parts, dealt, strict=True)}
    return {name: drawn[name] for name in ("train", "val", "test")}


def least_per_class(config: Data, part: str) -> int:
    """How many images of each class a split cannot do without."""
    return max(config.per_class or 1, (config.folds or 2) - 1) if part == "train" else 1


def shuffled_members(pool: Pool, chosen: list[int], generator: torch.Generator) -> list[Tensor]:
    order, counts = pool.labels.argsort(stable=True), pool.labels.bincount(minlength=max(chosen) + 1)
    members = order.split(counts.tolist())
    return [members[k][torch.randperm(len(members[k]), generator=generator)] for k in chosen]


def split_sizes(config: Data, parts: list[str], total: int, least: int, rest_is_test: bool) -> list[int]:
    """How many images each part takes of `total`; at least one per class.  Train is what the others leave, if not given."""
    few = None if config.per_class is None else config.per_class * least
    asked = {"train": few or config.train_images, "val": config.val_images, "test": config.test_images}
    sizes: dict[str, int] = {}
    for name in parts:
        given = asked[name]
        if given is not None and given < least:
            raise UserError(f"data.{name}_images is {given}: one image per class is the least, {least} here; raise it")
        if given is not None or len(parts) == 1:
            sizes[name] = total if given is None else given
        elif name == "test" and not (rest_is_test and asked["train"] is not None):
            sizes[name] = max(least, round(0.2 * total))
        elif name == "val":
            sizes[name] = max(least, round(0.1 * (total - sizes.get("test", 0))))
    free = [name for name in parts if name not in sizes]  # at most one
    left = total - sum(sizes.values())
    if left < least * len(free):
        took = " + ".join(f"{name} {n}" for name, n in sizes.items()) + f" = {total - left} images"
        wrong = (
            f"leave {left} of {total} for {free[0]}, {least} or more are needed"
            if free
            else f"are more than the {total} there are"
        )
        raise UserError(f"{took} {wrong}; lower {asked_keys(config, parts)}")
    return [sizes.get(name, left) for name in parts]


def asked_keys(config: Data, parts: list[str]) -> str:
    keys = [f"{name}_images" for name in parts] + ["per_class"] * ("train" in parts)
    return " or ".join(f"data.{key}" for key in keys if getattr(config, key) is not None) or "data.val_images"


def deal(config: Data, members: list[Tensor], parts: list[str], sizes: list[int]) -> list[Tensor]:
    """Cut the classes' images (one tensor each) into parts of these sizes."""
    dealt = []
    for i, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        if part == "train" and config.per_class is not None:
            shares = [config.per_class] * len(members)
        else:
            reserve = sum(least_per_class(config, later) for later in parts[i + 1 :])
            shares = quotas([len(ids) for ids in members], size, reserve)
        dealt.append(torch.cat([ids[:n] for ids, n in zip(members, shares, strict=True)]).sort().values)
        members = [ids[n:] for ids, n in zip(members, shares, strict=True)]
    return dealt


def deal_folds(config: Data, members: list[Tensor], parts: list[str], folds: int) -> list[Tensor]:
    """Test first, the same for every fold; of the rest, image after image and class after class, each goes to the next fold."""
    tests, total = [], sum(map(len, members))
    if "test" in parts:
        size = max(len(members), round(0.2 * total)) if config.test_images is None else config.test_images
        if not len(members) <= size <= total - folds * len(members):
            raise UserError(
                f"data.test_images is {size}: from {len(members)} (one per class) to {total - folds * len(members)} "
                f"({folds} folds of {total} images) are possible"
            )
        shares = quotas([len(ids) for ids in members], size, folds)
        tests = [torch.cat([ids[:n] for ids, n in zip(members, shares, strict=True)]).sort().values]
        members = [ids[n:] for ids, n in zip(members, shares, strict=True)]
    starts = np.cumsum([0, *map(len, members)])
    fold = [(torch.arange(len(ids)) + int(start)) % folds == config.fold for ids, start in zip(members, starts, strict=False)]
    val = torch.cat([ids[mine] for ids, mine in zip(members, fold, strict=True)]).sort().values
    rest = [ids[~mine] for ids, mine in zip(members, fold, strict=True)]
    left = sum(map(len, rest))
    if config.per_class is not None and (least := min(map(len, rest))) < config.per_class:
        raise UserError(f"data.per_class is {config.per_class}: fold {config.fold} leaves {least} images of a class; lower it")
    size = left if config.train_images is None else config.train_images
    if not len(members) <= size <= left:
        raise UserError(
            f"data.train_images is {size}: from {len(members)} (one per class) to {left} are left by fold {config.fold}"
        )
    return [*tests, val, *deal(config, rest, ["train"], [size])]


def quotas(counts: list[int], n: int, reserve: int) -> list[int]:
    """How many of n each class gives: in proportion, at least one, and leaving at least `reserve`."""
    total = sum(counts)
    found = [min(max(1, n * count // total), count - reserve) for count in counts]

    def lack(k: int) -> int:  # what class k is short of its share, times total
        return n * counts[k] - found[k] * total

    while (missing := n - sum(found)) != 0:
        if missing > 0:
            k = max((k for k, count in enumerate(counts) if found[k] < count - reserve), key=lack)
        else:
            k = min((k for k in range(len(counts)) if found[k] > 1), key=lack)
        found[k] += 1 if missing > 0 else -1
    return found
