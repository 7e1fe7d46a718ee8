"""What fits into memory: weights, and what a step keeps of each image for its backward pass."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pupil.fit import activate, step
from pupil.methods.alone import Alone
from pupil.methods.base import Method
from pupil.net import Net
from pupil.types import Batch, Terms

PROBES = 2  # images of the step that is looked at
SPARE = 0.9  # of the free memory, what a training may take


class Need(NamedTuple):
    """Bytes."""

    fixed: int  # weights, their gradients and momenta
    image: float  # of each image of a batch

    def images(self, free: int) -> int:
        """That fit."""
        return max(0, int((SPARE * free - self.fixed) / max(self.image, 1)))

    def at(self, batch_size: int) -> float:
        return self.fixed + self.image * batch_size


def need(method: Method | Alone, teacher: Net | None, classes: int, image_size: int) -> tuple[Need, Terms]:
    """Of the hungriest phase, by one step on two images; and the terms of the last phase.  It leaves the method changed."""
    images = torch.randn(PROBES, 3, image_size, image_size)
    batch = Batch(images, torch.arange(PROBES) % classes, torch.arange(PROBES), strong=images)
    weights = total(method.parameters()) + total(method.buffers())
    t, most, terms = None if teacher is None else teacher.features(images), 0.0, {}
    for phase in method.phases():
        kept: dict[int, int] = {}

        def pack(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        activate(method, phase)
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 1e-6)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            terms = step(method, t, batch, phase, optimizer)
        most = max(most, sum(kept.values()) - weights)
    return Need(3 * weights, most / PROBES), terms


def total(tensors: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def advice(needs: Iterable[Need], free: int, batch_size: int, key: str) -> str:
    """What to do where a training at `batch_size` found no room, although so many bytes are free without it."""
    all_needs = list(needs)
    together = Need(sum(n.fixed for n in all_needs), sum(n.image for n in all_needs))
    fit = together.images(free)
    words = f"it needs about {together.at(batch_size) / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free"
    if fit < 2:
        return f"{words}: not even two images at once fit; use a smaller network, smaller images or another device"
    smaller = min(1 << (fit.bit_length() - 1), max(2, batch_size // 2))
    return f"{words}, which is enough for about {fit:,} images at once; use {key}={smaller}"
