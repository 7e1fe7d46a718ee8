"""Batches of a split: its pixels are uint8, whole on the device (`Resident`) or on disk (`Streamed`), cropped and flipped
on the device.  Which of the two changes no bit of a batch.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pupil.data.files import Pixels
from pupil.data.strong import Draws, strengthen
from pupil.data.strong import draw as draw_strong
from pupil.types import Batch

AHEAD = 2  # batches that are read while one is trained on


class Augment(NamedTuple):
    """Random crop after zero padding by `pad` pixels, then a horizontal flip with probability one half."""

    pad: int = 0
    flip: bool = False


class Resident:
    """Batches of one split.

    With a seed the samples are shuffled and augmented; both are a function of (seed, epoch, sample id) alone, so every
    method at one seed sees the same batches.  Without a seed the order is the split's own and nothing is augmented.
    """

    def __init__(
        self,
        images: Tensor | Pixels,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        device: torch.device,
        seed: int | None = None,
        augment: Augment = Augment(),
        two_views: bool = False,
    ) -> None:
        """`images` (N, 3, H, W) uint8, `labels` (N,) int64; mean and std per channel, in units of 0..1.

        `two_views`: each batch has a second, strongly augmented view; the first is the same with and without it.
        """
        self.labels = labels.to(device)
        self.scale = 1 / (255 * torch.tensor(std, device=device).view(3, 1, 1))
        self.shift = -torch.tensor(mean, device=device).view(3, 1, 1) / torch.tensor(std, device=device).view(3, 1, 1)
        self.batch_size, self.seed, self.augment, self.device = batch_size, seed, augment, device
        self.two_views = two_views and seed is not None
        self.hold(images)

    def hold(self, images: Tensor | Pixels) -> None:
        self.images = (images if isinstance(images, Tensor) else images.mapped()).to(self.device)

    def read(self, order: Sequence[Tensor]) -> Iterator[Tensor]:
        """Of each batch the positions (B,) -> its pixels (B, 3, H, W) uint8, on the device."""
        return (self.images[ids] for ids in order)

    @property
    def samples(self) -> int:
        return len(self.labels)

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def epoch(self, number: int) -> Iterator[Batch]:
        order, corners, flips = self.draw(number)
        strong = self.second_view(number) if self.two_views else None
        batches = order.split(self.batch_size)
        for ids, images in zip(batches, self.read(batches), strict=True):
            view = self.normalise(self.move(images, corners[ids], flips[ids]))
            second = None if strong is None else self.normalise(strong(images, ids))
            yield Batch(view, self.labels[ids], ids, number, second)

    def move(self, images: Tensor, corners: Tensor, flips: Tensor) -> Tensor:
        """Crop and flip, each image by its own draws."""
        if self.seed is not None and self.augment.pad:
            images = crop(images, corners, self.augment.pad)
        if self.seed is not None and self.augment.flip:
            images = torch.where(flips.view(-1, 1, 1, 1), images.flip(3), images)
        return images

    def normalise(self, images: Tensor) -> Tensor:
        return images.float() * self.scale + self.shift

    def second_view(self, number: int) -> Callable[[Tensor, Tensor], Tensor]:
        """Of one epoch: pixels and ids -> a crop and a flip of their own, then what strong.py does."""
        g = torch.Generator().manual_seed((self.seed or 0) * 1_000_003 + number + 2**40)
        corners, flips = self.moves(g)
        draws = draw_strong(self.samples, g)

        def view(images: Tensor, ids: Tensor) -> Tensor:
            return strengthen(self.move(images, corners[ids], flips[ids]), Draws(*(d[ids.cpu()] for d in draws)))

        return view

    def moves(self, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Each sample's crop corner (N, 2) and flip (N,)."""
        corners = torch.randint(2 * self.augment.pad + 1, (self.samples, 2), generator=g)
        return corners.to(self.device), (torch.rand(self.samples, generator=g) < 0.5).to(self.device)

    def draw(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of one epoch: the order (N,), each sample's crop corner (N, 2) and flip (N,)."""
        n = self.samples
        if self.seed is None:
            order, corners, flips = torch.arange(n), torch.zeros(n, 2, dtype=torch.int64), torch.zeros(n, dtype=torch.bool)
        else:
            g = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            order = torch.randperm(n, generator=g)
            corners, flips = self.moves(g)
        return order.to(self.device), corners.to(self.device), flips.to(self.device)


class Streamed(Resident):
    """Its pixels stay in the file of the split: a few batches are in memory, whatever its size."""

    def hold(self, images: Tensor | Pixels) -> None:
        assert isinstance(images, Pixels), "a tensor is in memory already"
        self.pixels = images

    def read(self, order: Sequence[Tensor]) -> Iterator[Tensor]:
        cuda = self.device.type == "cuda"
        waiting: deque[Future[Tensor]] = deque()
        with ThreadPoolExecutor(AHEAD) as readers:
            for ids in torch.cat(list(order)).cpu().split(self.batch_size):
                waiting.append(readers.submit(self.pixels.read, ids, cuda))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result().to(self.device, non_blocking=True)
            while waiting:
                yield waiting.popleft().result().to(self.device, non_blocking=True)


def crop(images: Tensor, corners: Tensor, pad: int) -> Tensor:
    """Zero-pads (B, C, H, W) and cuts each image to its size again at its own corner (B, 2)."""
    b, _, h, w = images.shape
    padded = F.pad(images, (pad, pad, pad, pad))
    rows = corners[:, 0, None] + torch.arange(h, device=images.device)  # (B, H)
    cols = corners[:, 1, None] + torch.arange(w, device=images.device)  # (B, W)
    batch = torch.arange(b, device=images.device)
    return padded.permute(0, 2, 3, 1)[batch[:, None, None], rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
