"""The resident loader: a whole split as uint8 on the device, cropped and flipped there."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pupil.types import Batch


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
        images: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        device: torch.device,
        seed: int | None = None,
        augment: Augment = Augment(),
    ) -> None:
        """`images` (N, 3, H, W) uint8, `labels` (N,) int64; mean and std per channel, in units of 0..1."""
        self.images, self.labels = images.to(device), labels.to(device)
        self.scale = 1 / (255 * torch.tensor(std, device=device).view(3, 1, 1))
        self.shift = -torch.tensor(mean, device=device).view(3, 1, 1) / torch.tensor(std, device=device).view(3, 1, 1)
        self.batch_size, self.seed, self.augment, self.device = batch_size, seed, augment, device

    @property
    def samples(self) -> int:
        return len(self.labels)

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def epoch(self, number: int) -> Iterator[Batch]:
        order, corners, flips = self.draw(number)
        for ids in order.split(self.batch_size):
            images = self.images[ids]
            if self.seed is not None and self.augment.pad:
                images = crop(images, corners[ids], self.augment.pad)
            if self.seed is not None and self.augment.flip:
                images = torch.where(flips[ids].view(-1, 1, 1, 1), images.flip(3), images)
            yield Batch(images.float() * self.scale + self.shift, self.labels[ids], ids, number)

    def draw(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of one epoch: the order (N,), each sample's crop corner (N, 2) and flip (N,)."""
        n = self.samples
        if self.seed is None:
            order, corners, flips = torch.arange(n), torch.zeros(n, 2, dtype=torch.int64), torch.zeros(n, dtype=torch.bool)
        else:
            g = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            order = torch.randperm(n, generator=g)
            corners = torch.randint(2 * self.augment.pad + 1, (n, 2), generator=g)
            flips = torch.rand(n, generator=g) < 0.5
        return order.to(self.device), corners.to(self.device), flips.to(self.device)


def crop(images: Tensor, corners: Tensor, pad: int) -> Tensor:
    """Zero-pads (B, C, H, W) and cuts each image to its size again at its own corner (B, 2)."""
    b, _, h, w = images.shape
    padded = F.pad(images, (pad, pad, pad, pad))
    rows = corners[:, 0, None] + torch.arange(h, device=images.device)  # (B, H)
    cols = corners[:, 1, None] + torch.arange(w, device=images.device)  # (B, W)
    batch = torch.arange(b, device=images.device)
    return padded.permute(0, 2, 3, 1)[batch[:, None, None], rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
