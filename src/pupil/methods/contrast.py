"""What CRD and CRDTH have in common: two embeddings and two memory banks, contrasted with each other."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pupil.methods.base import Method, Setup
from pupil.types import Batch, UserError

EPS = 1e-7
BANKS = {"float32": torch.float32, "float16": torch.float16}
WORTH_SAYING = 64  # MiB of both banks
DENSE = 16  # up to so many images per negative, scoring all images once costs less than fetching the rows of each
PIECE = 2**23  # numbers that are fetched at once


class Contrast(Method):
    """Its `knowledge` is the sum of both NCE losses."""

    remembers = ("recognised",)

    @dataclass(frozen=True)
    class Config(Method.Config):
        beta: float = 0.8
        dim: int = 128  # of both embeddings
        k: int = 16384  # negatives of each image
        tau: float = 0.07  # temperature of the scores
        momentum: float = 0.5  # of the banks' rows
        positive: str = "exact"  # exact: the image itself; relax: any of its class
        bank: str = "float32"  # float32 | float16

    spots = (-1,)
    bank_s: Tensor  # (N, dim) embeddings of the student; not of unit norm before the first visit
    bank_t: Tensor
    Z: Tensor  # (2,) zero before the first batch
    by_class: Tensor  # (N,) training ids, sorted by class
    starts: Tensor  # (K + 1,) where each class starts there

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        name = type(self).__name__.lower()
        n, bound = len(setup.labels), 1 / math.sqrt(hp.dim / 3) if hp.dim > 0 else 0.0
        counts = setup.labels.bincount()
        if hp.k < 1 or hp.dim < 1 or hp.tau <= 0:
            raise UserError(f"{name}: hp.{name}.k, dim and tau must be positive, got {hp.k}, {hp.dim} and {hp.tau}")
        if not 0 <= hp.momentum < 1:
            raise UserError(f"{name}: hp.{name}.momentum must be from 0 to below 1, got {hp.momentum}")
        if hp.positive not in ("exact", "relax"):
            raise UserError(f"{name}: hp.{name}.positive must be exact or relax, got {hp.positive!r}")
        if hp.bank not in BANKS:
            raise UserError(f"{name}: hp.{name}.bank must be float32 or float16, got {hp.bank!r}")
        if counts.max() == n:
            raise UserError(f"{name}: negatives come from other classes, but all {n} training images are of one class")
        dtype = BANKS[hp.bank]
        size = 2 * n * hp.dim * dtype.itemsize / 2**20
        if size > WORTH_SAYING:
            print(f"{name}: two memory banks of {n} x {hp.dim} {hp.bank} take {size:.0f} MiB of the device", flush=True)
        self.embed_s = nn.Linear(setup.s.embedding.shape[1], hp.dim)
        self.embed_t = nn.Linear(setup.t.embedding.shape[1], hp.dim)
        self.register_buffer("bank_s", torch.empty(n, hp.dim, dtype=dtype).uniform_(-bound, bound))
        self.register_buffer("bank_t", torch.empty(n, hp.dim, dtype=dtype).uniform_(-bound, bound))
        self.register_buffer("Z", torch.zeros(2))
        self.register_buffer("by_class", setup.labels.argsort(stable=True))
        self.register_buffer("starts", F.pad(counts.cumsum(0), (1, 0)))
        self.recognised: dict[int, Tensor] = {}  # side -> how surely the last batch's positives were told from noise

    def match(self, i: int, f_s: Tensor, f_t: Tensor, batch: Batch) -> Tensor:
        positives = batch.ids if self.hp.positive == "exact" else self.of_same_class(batch.labels)
        return self.contrast(f_s, f_t, torch.cat([positives[:, None], self.negatives(batch.labels)], 1), batch.ids)

    def contrast(self, f_s: Tensor, f_t: Tensor, rows: Tensor, ids: Tensor | None = None) -> Tensor:
        """Both NCE losses, then the banks' update.

        `rows` (B, 1 + k): the positive's id, the negatives'; `ids` (B,): the rows to update, by default the positives'.
        """
        ids, m = rows[:, 0] if ids is None else ids, self.hp.momentum
        with torch.autocast(f_s.device.type, enabled=False):
            v_s, v_t = unit(self.embed_s(f_s.float())), unit(self.embed_t(f_t.float()))
            loss = self.nce(0, v_s, self.bank_t, rows) + self.nce(1, v_t, self.bank_s, rows)
            with torch.no_grad():
                for bank, v in ((self.bank_s, v_s), (self.bank_t, v_t)):
                    bank[ids] = unit(m * bank[ids].float() + (1 - m) * v).to(bank.dtype)
        return loss

    def nce(self, side: int, v: Tensor, bank: Tensor, rows: Tensor) -> Tensor:
        """The loss of one side, and its gradient written out, so that no score has to be kept for the way back.

        With h = P / (P + c + eps) the gradient is dNCE/dv_b = 1 / (B tau) sum_j (h_bj - [j = 0]) bank[rows_bj].
        """
        with torch.no_grad():
            p, c = self.probabilities(side, v, bank, rows), (rows.shape[1] - 1) / len(bank)
            h = p / (p + c + EPS)
            value = -(h[:, 0].log().sum() + torch.log(c / (p[:, 1:] + c + EPS)).sum()) / len(v)
            self.recognised[side] = h[:, 0].mean()
            slope = blend(bank, rows, torch.cat([h[:, :1] - 1, h[:, 1:]], 1)) / (len(v) * self.hp.tau)
        return value + ((v - v.detach()) * slope).sum()

    def probabilities(self, side: int, v: Tensor, bank: Tensor, rows: Tensor) -> Tensor:
        """(B, 1 + k): P of each row; the first batch sets Z."""
        scores = torch.exp(dots(bank, rows, v) / self.hp.tau)
        self.Z[side] = torch.where(self.Z[side] == 0, scores.mean() * len(bank), self.Z[side])
        return scores / self.Z[side]

    def negatives(self, labels: Tensor) -> Tensor:
        """(B,) -> (B, k) training ids, uniform over the images of other classes."""
        start = self.starts[labels][:, None]
        size = self.starts[labels + 1][:, None] - start
        r = (torch.rand(len(labels), self.hp.k, device=labels.device) * (len(self.by_class) - size)).long()
        return self.by_class[r + size * (r >= start)]

    def of_same_class(self, labels: Tensor) -> Tensor:
        """(B,) -> (B,) training ids, uniform over the images of the class."""
        size = self.starts[labels + 1] - self.starts[labels]
        return self.by_class[self.starts[labels] + (torch.rand(len(labels), device=labels.device) * size).long()]

    def observed(self) -> dict[str, Tensor]:
        """How surely the positive is told from noise, P / (P + c), mean over the last batch; of either side."""
        return {f"positive_probability_{'st'[side]}": mean for side, mean in self.recognised.items()}


def unit(v: Tensor) -> Tensor:
    """(B, D) -> (B, D), unit norm, no epsilon."""
    return v / v.norm(dim=1, keepdim=True)


def dots(bank: Tensor, rows: Tensor, v: Tensor) -> Tensor:
    """(N, D), (B, R), (B, D) -> (B, R): <bank[rows_bj], v_b>."""
    if is_dense(bank, rows):
        return (v @ bank.float().T).gather(1, rows)
    out = v.new_empty(rows.shape)
    for some, found in fetched(bank, rows):
        out[some] = torch.bmm(found, v[some, :, None])[:, :, 0]
    return out


def blend(bank: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """(N, D), (B, R), (B, R) -> (B, D): sum_j weights_bj bank[rows_bj]."""
    if is_dense(bank, rows):
        return weights.new_zeros(len(rows), len(bank)).scatter_add_(1, rows, weights) @ bank.float()
    out = weights.new_empty(len(rows), bank.shape[1])
    for some, found in fetched(bank, rows):
        out[some] = torch.bmm(weights[some, None], found)[:, 0]
    return out


def is_dense(bank: Tensor, rows: Tensor) -> bool:
    return len(bank) <= DENSE * rows.shape[1]


def fetched(bank: Tensor, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some images of the batch at a time, and the bank's rows for them (b, R, D)."""
    images = max(1, PIECE // (rows.shape[1] * bank.shape[1]))
    for start in range(0, len(rows), images):
        some = slice(start, start + images)
        yield some, bank[rows[some]].float()
