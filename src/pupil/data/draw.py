"""Which images go to which split: stratified draws, all by one seed.

Of each class the images are put in a random order once; test takes the first, val the next, train what follows.  So a
change of `train_images` alone leaves val and test as they are, and a smaller training set is a part of a larger one.
"""

from difflib import get_close_matches
from typing import NamedTuple

import torch
from torch import Tensor

from pupil.data.base import Content, Data, Pool
from pupil.types import UserError


class Drawn(NamedTuple):
    home: str  # the source's split: train | val | test
    ids: Tensor  # (n,) int64, ascending positions in it


def class_indices(config: Data, names: tuple[str, ...]) -> list[int]:
    """The source's index of each class, in the order of the new labels."""
    if config.classes is None:
        return list(range(len(names)))
    chosen = [class_index(given, names) for given in config.classes]
    twice = [names[k] for k in dict.fromkeys(chosen) if chosen.count(k) > 1]
    if twice:
        raise UserError(f"data.classes names class {twice[0]!r} twice; each may be there once")
    if len(chosen) < 2:
        raise UserError(f"data.classes is {list(config.classes)}: 2 classes or more are needed")
    return chosen


def class_index(given: int | str, names: tuple[str, ...]) -> int:
    if isinstance(given, str):
        if given in names:
            return names.index(given)
        near = get_close_matches(given, names, 1)
        hint = (
            f"did you mean {near[0]!r}?"
            if near
            else f"the classes are {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
        )
        raise UserError(f"data.classes: there is no class {given!r}; {hint}")
    if not 0 <= given < len(names):
        raise UserError(f"data.classes: class {given} of {len(names)}; indices are 0 to {len(names) - 1}")
    return given


def draw(config: Data, content: Content, chosen: list[int]) -> dict[str, Drawn]:
    """For train, val and test the images drawn; disjoint, every class in each."""
    pools = {"test": content.test, "val": content.val, "train": content.train}
    held_out = [name for name, pool in pools.items() if pool is None]
    generator = torch.Generator().manual_seed(config.seed)
    drawn = {}
    for home, pool in pools.items():
        if pool is None:
            continue
        parts = [*held_out, "train"] if home == "train" else [home]
        members = shuffled_members(pool, chosen, generator)
        for k, ids in zip(chosen, members, strict=True):
            if len(ids) < len(parts):
                raise UserError(
                    f"class {content.classes[k]!r} has {len(ids)} images for {' and '.join(parts)}: {len(parts)} or more are "
                    f"needed; add images to its {home} folder or choose the other classes with data.classes"
                )
        sizes = split_sizes(config, parts, sum(map(len, members)), len(chosen), content.rest_is_test)
        for name, ids in zip(parts, deal(members, sizes), strict=True):
            drawn[name] = Drawn(home, ids)
    return {name: drawn[name] for name in ("train", "val", "test")}


def shuffled_members(pool: Pool, chosen: list[int], generator: torch.Generator) -> list[Tensor]:
    members = [(pool.labels == k).nonzero().flatten() for k in chosen]
    return [ids[torch.randperm(len(ids), generator=generator)] for ids in members]


def split_sizes(config: Data, parts: list[str], total: int, least: int, rest_is_test: bool) -> list[int]:
    """How many images each part takes of `total`; at least one per class.  Train is what the others leave, if not given."""
    asked = {"train": config.train_images, "val": config.val_images, "test": config.test_images}
    sizes: dict[str, int] = {}
    for name in parts:
        given = asked[name]
        if given is not None and given < least:
            raise UserError(f"data.{name}_images is {given}: one image per class is the least, {least} here; raise it")
        if given is not None or len(parts) == 1:
            sizes[name] = total if given is None else given
        elif name == "test" and not (rest_is_test and config.train_images is not None):
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
        raise UserError(f"{took} {wrong}; lower {asked_keys(asked, parts)}")
    return [sizes.get(name, left) for name in parts]


def asked_keys(asked: dict[str, int | None], parts: list[str]) -> str:
    given = [name for name in parts if asked[name] is not None] or ["val"]
    return " or ".join(f"data.{name}_images" for name in given)


def deal(members: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """Cut the classes' images (one tensor each) into parts of these sizes."""
    parts = []
    for i, size in enumerate(sizes):
        shares = quotas([len(ids) for ids in members], size, len(sizes) - 1 - i)
        parts.append(torch.cat([ids[:n] for ids, n in zip(members, shares, strict=True)]).sort().values)
        members = [ids[n:] for ids, n in zip(members, shares, strict=True)]
    return parts


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
