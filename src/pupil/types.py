"""The things that travel through the code: a batch, what a network says about it, a loss."""

from __future__ import annotations  # so that UserError needs no torch

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

from pupil.errors import UserError as UserError


class Batch(NamedTuple):
    images: Tensor  # (B, 3, H, W) float32, normalised, on the device
    labels: Tensor  # (B,) int64, 0..K-1
    ids: Tensor  # (B,) int64, position in the training set
    epoch: int = 1  # 1-based, for loss weights that warm up
    strong: Tensor | None = None  # (B, 3, H, W) the same images, strongly augmented, for methods of two views


class Features(NamedTuple):
    stem: Tensor  # (B, C0, H0, W0)
    maps: tuple[Tensor, ...]  # one (B, C, H, W) per stage, shallow to deep
    pre: tuple[Tensor, ...]  # the same before the ReLU that follows them
    last: Tensor  # (B, C, H, W) what is pooled
    embedding: Tensor  # (B, D) what the head sees
    logits: Tensor  # (B, K)

    @property
    def taps(self) -> tuple[Tensor, ...]:
        """Stem, every stage, embedding: the spots where knowledge can be taken, by depth."""
        return (self.stem, *self.maps, self.embedding)


class Term(NamedTuple):
    """One term of a loss: the loss is the sum of weight * raw over all terms."""

    raw: Tensor  # scalar, float32
    weight: float


Terms = dict[str, Term]  # the names are the names of the metrics


class Loader(Protocol):
    """Batches of one split, on the device."""

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        """Every sample once; the order and the augmentation depend on the seed and the number alone.

        `first`: batches before it are left out.
        """
        ...

    def __len__(self) -> int:
        """Number of batches of an epoch."""
        ...

    @property
    def samples(self) -> int: ...
