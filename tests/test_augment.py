"""What is drawn for an image is a function of seed, epoch and id: not of batch, order, shard, loader, device or process."""

import pytest
import torch
from torch import Tensor

from pupil.data.augment import ORDER, VIEW, Augment, bits, moves, order, uniform
from pupil.data.batches import Shard
from pupil.data.resident import Resident
from pupil.data.strong import OPERATIONS, draw

N = 60
CPU = torch.device("cpu")


def loader(seed: int | None = 0, batch_size: int = 7, shard: Shard = Shard()) -> Resident:
    images = torch.randint(0, 256, (N, 3, 9, 9), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    about = (torch.arange(N) % 5, (0.5,) * 3, (0.25,) * 3, batch_size, CPU, seed, Augment(2, True), True)
    return Resident(images, *about, shard=shard)


def by_id(batches: Resident, number: int, first: int = 0) -> dict[int, tuple[Tensor, Tensor, int]]:
    found = {}
    for b in batches.epoch(number, first):
        assert b.strong is not None
        for row in zip(b.ids.tolist(), b.images, b.strong, b.labels.tolist(), strict=True):
            assert row[0] not in found
            found[row[0]] = row[1:]
    return found


def same(a: tuple[Tensor, Tensor, int], b: tuple[Tensor, Tensor, int]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]


@pytest.mark.parametrize("of", [1, 2, 7])
@pytest.mark.parametrize("batch_size", [1, 16, 100])
def test_other_batches_and_shards_show_the_same_image_for_an_id(batch_size: int, of: int) -> None:
    whole = by_id(loader(), 3)
    shards = [loader(0, batch_size, Shard(i, of)) for i in range(of)]
    parts = [by_id(shard, 3) for shard in shards]
    assert sorted(i for part in parts for i in part) == list(range(N)), "each id in one shard"
    assert all(len(part) == shard.samples for part, shard in zip(parts, shards, strict=True))
    assert all(same(whole[i], shown) for part in parts for i, shown in part.items())


def test_a_resumed_epoch_goes_on_where_it_was_broken_off() -> None:
    whole = list(loader().epoch(2))
    for first in (0, 3, len(whole) - 1, len(whole)):
        rest = list(loader().epoch(2, first))
        assert len(rest) == len(whole) - first
        for a, b in zip(whole[first:], rest, strict=True):
            assert torch.equal(a.ids, b.ids)
            assert torch.equal(a.images, b.images)


def test_epochs_and_seeds_show_other_images_in_another_order() -> None:
    first = by_id(loader(0), 1)
    for seed, number in ((0, 2), (1, 1), (1, 0)):
        other = by_id(loader(seed), number)
        assert sum(same(first[i], shown) for i, shown in other.items()) < 5
        assert list(first) != list(other)
        assert sorted(first) == sorted(other)


def test_numbers_are_those_of_splitmix64() -> None:
    """The generator written plainly in Python's own integers."""

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    golden, seed, epoch, stream = 0x9E3779B97F4A7C15, 12, 34, 2
    assert mix(golden) == 0xE220A8397B1DCDAF, "SplitMix64's first number from seed 0, as published"
    state = 0
    for part in (seed, stream, epoch):
        state = mix((state + (part + 1) * golden) % 2**64)
    ids = [0, 5, 2**40]
    wanted = [[mix((mix((state + (i + 1) * golden) % 2**64) + k * golden) % 2**64) for k in (1, 2, 3)] for i in ids]
    found = bits(seed, epoch, torch.tensor(ids), 3, stream)
    assert [[x % 2**64 for x in row] for row in found.tolist()] == wanted
    assert uniform(seed, epoch, torch.tensor(ids), 3, stream).tolist() == [[(x >> 11) / 2**53 for x in row] for row in wanted]


def chi_square(counts: Tensor) -> float:
    """In standard deviations above what a uniform distribution gives."""
    expected = counts.sum() / len(counts)
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("seed", [0, 1, 2**40])
@pytest.mark.parametrize("epoch", [1, 240])
def test_draws_are_uniform_and_independent(seed: int, epoch: int) -> None:
    ids = torch.arange(40_000)
    u = uniform(seed, epoch, ids, 4, VIEW)
    assert u.min() >= 0
    assert u.max() < 1
    for k in range(4):
        assert chi_square((u[:, k] * 100).long().bincount(minlength=100).double()) < 4
    others = [
        u[:, 1],
        u[:, 0].roll(1),
        uniform(seed, epoch + 1, ids, 1, VIEW)[:, 0],
        uniform(seed + 1, epoch, ids, 1, VIEW)[:, 0],
    ]
    for other in [*others, uniform(seed, epoch, ids, 1, ORDER)[:, 0]]:
        pairs = (u[:, 0] * 10).long() * 10 + (other * 10).long()
        assert chi_square(pairs.bincount(minlength=100).double()) < 4
    corners, flips = moves(Augment(4, True), seed, epoch, ids)
    for part in (corners[:, 0], corners[:, 1]):
        assert (part.min(), part.max()) == (0, 8)
        assert chi_square(part.bincount(minlength=9).double()) < 4
    assert chi_square(flips.long().bincount(minlength=2).double()) < 4
    assert chi_square(draw(seed, epoch, ids).operations.flatten().bincount(minlength=len(OPERATIONS)).double()) < 4


def test_every_place_of_the_order_is_as_likely() -> None:
    places = torch.stack([order(seed, epoch, 12) for seed in range(60) for epoch in range(60)])
    for column in places.T:
        assert chi_square(column.bincount(minlength=12).double()) < 4
    assert all(row == list(range(12)) for row in places.sort(1).values.tolist())


def test_without_a_flip_or_a_pad_nothing_is_flipped_or_moved() -> None:
    ids = torch.arange(100)
    assert not moves(Augment(4, False), 0, 1, ids).flips.any()
    assert not moves(Augment(0, True), 0, 1, ids).corners.any()
    still = moves(Augment(4, True), None, 1, ids)
    assert not still.flips.any()
    assert (still.corners == 4).all()
