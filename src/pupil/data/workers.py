"""Batches made by processes of their own, image by image, with Pillow and torchvision: the reference for other loaders."""

import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pupil import distributed
from pupil.data.augment import STRONG, VIEW, Augment, moves
from pupil.data.batches import Batches, Views
from pupil.data.encoded import Encoded, as_tensor, opened
from pupil.data.files import Pixels
from pupil.data.resized import cut, cuts
from pupil.data.strong import draw, strengthen

Job = tuple[int, Tensor]  # epoch, ids (B,)


class Workers(Batches):
    """Its images stay on disk."""

    def hold(self, images: Tensor | Pixels | Encoded) -> None:
        assert not isinstance(images, Tensor), "in memory already"
        self.made = Made(images, self.drawn, self.augment, self.two_views)

    def views(self, number: int, plan: Sequence[Tensor]) -> Iterator[Views]:
        if not plan:
            return
        loader = DataLoader(
            self.made,
            batch_size=None,  # an item is a batch: what is drawn for it is drawn where it is made
            sampler=[(number, ids) for ids in plan],  # pyright: ignore[reportArgumentType]
            num_workers=min(cores(), len(plan)),
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # its own: the training's random numbers are those of every other loader
        )
        for weak, *strong in loader:
            yield Views(*(part.to(self.device, non_blocking=True) for part in (weak, *strong)))


class Made(Dataset[tuple[Tensor, ...]]):
    """Epoch and ids (B,) -> (B, 3, S, S) uint8, and the second view if there are two."""

    def __init__(self, images: Pixels | Encoded, seed: int | None, augment: Augment, two_views: bool) -> None:
        self.images, self.seed, self.augment, self.two_views = images, seed, augment, two_views

    def __getitem__(self, job: Job) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        number, ids = job
        weak = self.view(number, ids, VIEW)
        if not self.two_views:
            return (weak,)
        return weak, strengthen(self.view(number, ids, STRONG), draw(self.seed or 0, number, ids))

    def view(self, number: int, ids: Tensor, stream: int) -> Tensor:
        images, side = self.images, self.images.shape[-1]
        if isinstance(images, Pixels):
            return self.padded(images.read(ids), number, ids, stream) if self.seed is not None else images.read(ids)
        if self.seed is None:
            return images.read(ids)
        windows, flips = cuts(images.sizes[ids], self.augment, self.seed, number, ids, stream)
        each = zip(images.files(ids.tolist()), windows.tolist(), flips.tolist(), strict=True)
        return torch.stack([as_tensor(cut(opened(raw), window, flip, side)) for raw, window, flip in each])

    def padded(self, pixels: Tensor, number: int, ids: Tensor, stream: int) -> Tensor:
        from torchvision.transforms.v2 import functional as F

        pad, side = self.augment.pad, self.images.shape[-1]
        corners, flips = moves(self.augment, self.seed, number, ids, stream)
        shown = []
        for image, (top, left), flip in zip(pixels, corners.tolist(), flips.tolist(), strict=True):
            moved = F.crop(F.pad(image, [pad] * 4), top, left, side, side)
            shown.append(F.horizontal_flip(moved) if flip else moved)
        return torch.stack(shown)


def cores() -> int:
    """Of this machine, for each training process."""
    return max(1, min(16, len(os.sched_getaffinity(0)) // distributed.world()))
