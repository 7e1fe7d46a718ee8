"""Batches of a split whose pixels are uint8, whole on the device (`Resident`) or on disk (`Streamed`), cropped and flipped
on the device.  Which of the two changes no bit of a batch.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from pupil.data.augment import STRONG, VIEW, Augment, Moves, crop, move, moves
from pupil.data.batches import Batches, Shard, Views
from pupil.data.encoded import Encoded
from pupil.data.files import Pixels
from pupil.data.strong import draw, strengthen

__all__ = ["Augment", "Batches", "Resident", "Shard", "Streamed", "crop"]
AHEAD = 2  # batches that are read while one is trained on


class Resident(Batches):
    """Its pixels are on the device."""

    def hold(self, images: Tensor | Pixels | Encoded) -> None:
        assert not isinstance(images, Encoded), "no pixels of one size"
        self.images = (images if isinstance(images, Tensor) else images.mapped()).to(self.device)

    def read(self, plan: Sequence[Tensor]) -> Iterator[Tensor]:
        """Of each batch the ids (B,) -> its pixels (B, 3, H, W) uint8, on the device."""
        return (self.images[ids] for ids in torch.cat(list(plan)).to(self.device).split(self.batch_size))

    def views(self, number: int, plan: Sequence[Tensor]) -> Iterator[Views]:
        if not plan:
            return
        weak, strong = (self.all_moves(number, plan, stream) for stream in (VIEW, STRONG))
        for ids, images, here, there in zip(plan, self.read(plan), weak, strong, strict=True):
            first = images if self.drawn is None else move(images, here, self.augment.pad)
            second = move(images, there, self.augment.pad) if self.two_views else None
            yield Views(first, None if second is None else strengthen(second, draw(self.drawn or 0, number, ids)))

    def all_moves(self, number: int, plan: Sequence[Tensor], stream: int) -> Iterator[Moves]:
        """Those of each batch, drawn at once: on a GPU many small draws would take longer than the batch."""
        drawn = moves(self.augment, self.drawn, number, torch.cat(list(plan)).to(self.device), stream)
        return map(Moves._make, zip(*(part.split(self.batch_size) for part in drawn), strict=True))


class Streamed(Resident):
    """Its pixels stay in the file of the split: a few batches are in memory, whatever its size."""

    def hold(self, images: Tensor | Pixels | Encoded) -> None:
        assert isinstance(images, Pixels), "a tensor is in memory already"
        self.pixels = images

    def read(self, plan: Sequence[Tensor]) -> Iterator[Tensor]:
        cuda = self.device.type == "cuda"
        waiting: deque[Future[Tensor]] = deque()
        with ThreadPoolExecutor(AHEAD) as readers:
            for ids in plan:
                waiting.append(readers.submit(self.pixels.read, ids, cuda))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result().to(self.device, non_blocking=True)
            while waiting:
                yield waiting.popleft().result().to(self.device, non_blocking=True)
