"""What all loaders share: the order of the samples, shards, normalisation, and batches of exact sizes."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pupil.data.augment import Augment, order, view_of
from pupil.data.encoded import Encoded
from pupil.data.files import Pixels
from pupil.types import Batch

OF_ALL_SEEDS = 0  # the seed of the draws where there are few views: what a teacher says of them then serves every seed


class Shard(NamedTuple):
    """Every `of`-th sample of the epoch's order, from the one at `part`: the shards of an epoch have no sample in common."""

    part: int = 0
    of: int = 1


class Views(NamedTuple):
    """Of one batch, on the device."""

    images: Tensor  # (B, 3, H, W) uint8
    strong: Tensor | None = None  # the same of the second view


class Batches:
    """Batches of one split.

    With a seed the samples are shuffled and augmented: the order is a function of (seed, epoch), what is done to an image of
    (seed, epoch, id), so that every loader, batch size, shard and resumed run sees the same images, and every method at one
    seed the same batches.  Without a seed the order is the split's own and nothing is augmented.

    With `views` an image is augmented in so many ways and no more, by turns from epoch to epoch, the same for all seeds.
    """

    def __init__(
        self,
        images: Tensor | Pixels | Encoded,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        device: torch.device,
        seed: int | None = None,
        augment: Augment = Augment(),
        two_views: bool = False,
        shard: Shard = Shard(),
        views: int | None = None,
    ) -> None:
        """`images` (N, 3, H, W) uint8, or where they lie; `labels` (N,) int64; mean and std per channel, in units of 0..1.

        `two_views`: each batch has a second, strongly augmented view; the first is the same with and without it.
        """
        self.labels = labels.to(device)
        self.scale = 1 / (255 * torch.tensor(std, device=device).view(3, 1, 1))
        self.shift = -torch.tensor(mean, device=device).view(3, 1, 1) / torch.tensor(std, device=device).view(3, 1, 1)
        self.batch_size, self.seed, self.augment, self.device, self.shard = batch_size, seed, augment, device, shard
        self.two_views = two_views and seed is not None
        self.turns, self.drawn = views, seed if seed is None or views is None else OF_ALL_SEEDS
        self.hold(images)

    def hold(self, images: Tensor | Pixels | Encoded) -> None:
        """Make them ready."""
        raise NotImplementedError

    @property
    def samples(self) -> int:
        return len(range(self.shard.part, len(self.labels), self.shard.of))

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        """`first`: batches before it are left out, and not read: what remains of an epoch that was broken off."""
        return self.shown(number, self.order(number).split(self.batch_size)[first:])

    def shown(self, number: int, plan: Sequence[Tensor]) -> Iterator[Batch]:
        """What an epoch shows of the ids (B,), batch by batch; all but the last batch are of the batch size."""
        for ids, views in zip(plan, self.views(view_of(number, self.turns), plan), strict=True):
            here = ids.to(self.device)
            second = None if views.strong is None else self.normalise(views.strong)
            yield Batch(self.normalise(views.images), self.labels[here], here, number, second)

    def order(self, number: int) -> Tensor:
        """Of one epoch: the shard's ids, (samples,) int64 on the CPU."""
        n = len(self.labels)
        ids = torch.arange(n) if self.seed is None else order(self.seed, number, n)
        return ids[self.shard.part :: self.shard.of]

    def views(self, number: int, plan: Sequence[Tensor]) -> Iterator[Views]:
        """The images of each batch of ids (B,), augmented by the draws of seed `drawn` and epoch `number`."""
        raise NotImplementedError

    def normalise(self, images: Tensor) -> Tensor:
        """With the channels last in memory, whoever made them: the same kernels then compute the same bits."""
        return (images.float() * self.scale + self.shift).contiguous(memory_format=torch.channels_last)
