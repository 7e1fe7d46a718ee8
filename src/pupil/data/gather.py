"""Reads the images that were drawn, and leaves out those that cannot be read."""

from collections.abc import Callable

import torch
from torch import Tensor

from pupil.data.base import Content
from pupil.data.draw import Drawn
from pupil.data.report import Seen
from pupil.types import UserError

Arrays = dict[str, Tensor]  # images, labels, source_ids
Progress = Callable[[int, int], None]  # images read, of how many


def read(
    content: Content, drawn: dict[str, Drawn], chosen: list[int], progress: Progress
) -> tuple[dict[str, Arrays], dict[str, Seen]]:
    """All images of all splits, the labels 0.. in the order of `chosen`, and what was seen on the way."""
    total, done = sum(len(d.ids) for d in drawn.values()), 0

    def tick(number: int) -> None:
        nonlocal done
        done += number
        progress(done, total)

    relabel = torch.full((len(content.classes),), -1)
    relabel[chosen] = torch.arange(len(chosen))
    pools = {"train": content.train, "val": content.val, "test": content.test}
    splits: dict[str, Arrays] = {}
    seen: dict[str, Seen] = {}
    for name, (home, ids) in drawn.items():
        pool = pools[home]
        assert pool is not None, "drawn from a split that is there"
        images = pool.read(ids, tick)
        splits[name] = {"images": images.pixels, "labels": relabel[pool.labels[ids]], "source_ids": ids}
        names = [f"{home} {i}" if pool.names is None else pool.names[i] for i in ids.tolist()]
        seen[name] = Seen(names, images.sizes, images.marks, images.unreadable)
    return splits, seen


def told(unreadable: list[str]) -> str:
    if len(unreadable) == 1:
        return f"image {unreadable[0]}"
    more = f" and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
    return f"{len(unreadable)} images: {', '.join(unreadable[:5])}{more}"


def drop(splits: dict[str, Arrays], seen: dict[str, Seen], classes: list[str]) -> tuple[dict[str, Arrays], dict[str, Seen]]:
    """Without the images that could not be read."""
    kept, left = {}, {}
    for name, arrays in splits.items():
        s = seen[name]
        fine = [i for i in range(len(s.names)) if i not in s.unreadable]
        kept[name] = {key: value[fine] for key, value in arrays.items()} if s.unreadable else arrays
        left[name] = s._replace(names=[s.names[i] for i in fine], sizes=s.sizes[fine], marks=[s.marks[i] for i in fine])
        empty = (kept[name]["labels"].bincount(minlength=len(classes)) == 0).nonzero().flatten().tolist()
        if empty:
            raise UserError(f"no image of class {classes[empty[0]]!r} for {name} can be read; mend its files or leave it out")
    return kept, left
