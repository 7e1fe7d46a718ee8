"""CRD: tell the teacher's view of the same image from its views of others, with memory banks.

Paper: Tian, Krishnan & Isola, ICLR 2020, arXiv:1910.10699.
Loss: ce * CE + kl * KL(T) + beta * (NCE of the student against the teacher's bank + the other way round), with
v = W e + b scaled to unit norm, P = exp(<bank[j], v> / tau) / Z, c = k / N and
NCE = -1/B sum_b [ ln(P_b0 / (P_b0 + c + eps)) + sum_j ln(c / (P_bj + c + eps)) ].
Z is N times the mean score of the first batch, and stays.
Trained: the student and both embeddings W_s, W_t.  Deployed: the student.
Defaults: the authors' (beta 0.8, 128 dimensions, 16,384 negatives, tau 0.07, momentum 0.5).
Deviations: the k negatives are drawn on the device, per batch and with replacement (the authors': on the host and
without, where there are enough images); the graph that their first batch leaves on Z is cut.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pupil.methods.base import Method, Setup
from pupil.types import Batch, UserError


class CRD(Method):
    paper = "Tian et al., ICLR 2020, arXiv:1910.10699"

    @dataclass(frozen=True)
    class Config(Method.Config):
        beta: float = 0.8
        dim: int = 128
        k: int = 16384
        tau: float = 0.07
        momentum: float = 0.5

    spots = (-1,)
    bank_s: Tensor  # (N, dim) embeddings of the student; not of unit norm before the first visit
    bank_t: Tensor
    Z: Tensor  # (2,) zero before the first batch
    by_class: Tensor  # (N,) training ids, sorted by class
    starts: Tensor  # (K + 1,) where each class starts there

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        n, bound = len(setup.labels), 1 / math.sqrt(hp.dim / 3)
        counts = setup.labels.bincount()
        if hp.k < 1 or hp.dim < 1 or hp.tau <= 0:
            raise UserError(f"crd: hp.crd.k, dim and tau must be positive, got {hp.k}, {hp.dim} and {hp.tau}")
        if not 0 <= hp.momentum < 1:
            raise UserError(f"crd: hp.crd.momentum must be from 0 to below 1, got {hp.momentum}")
        if counts.max() == n:
            raise UserError(f"crd: negatives come from other classes, but all {n} training images are of one class")
        self.embed_s = nn.Linear(setup.s.embedding.shape[1], hp.dim)
        self.embed_t = nn.Linear(setup.t.embedding.shape[1], hp.dim)
        self.register_buffer("bank_s", torch.empty(n, hp.dim).uniform_(-bound, bound))
        self.register_buffer("bank_t", torch.empty(n, hp.dim).uniform_(-bound, bound))
        self.register_buffer("Z", torch.zeros(2))
        self.register_buffer("by_class", setup.labels.argsort(stable=True))
        self.register_buffer("starts", F.pad(counts.cumsum(0), (1, 0)))

    def match(self, i: int, f_s: Tensor, f_t: Tensor, batch: Batch) -> Tensor:
        return self.contrast(f_s, f_t, torch.cat([batch.ids[:, None], self.negatives(batch.labels)], 1))

    def contrast(self, f_s: Tensor, f_t: Tensor, rows: Tensor) -> Tensor:
        """Both NCE losses, then the banks' update; `rows` (B, 1 + k): the positive's id, the negatives'."""
        v_s, v_t = unit(self.embed_s(f_s).float()), unit(self.embed_t(f_t).float())
        loss = self.nce(0, v_s, self.bank_t, rows) + self.nce(1, v_t, self.bank_s, rows)
        with torch.no_grad():
            for bank, v in ((self.bank_s, v_s), (self.bank_t, v_t)):
                ids, m = rows[:, 0], self.hp.momentum
                bank[ids] = unit(m * bank[ids] + (1 - m) * v)
        return loss

    def nce(self, side: int, v: Tensor, bank: Tensor, rows: Tensor) -> Tensor:
        scores = torch.exp(torch.einsum("bkd,bd->bk", bank[rows], v) / self.hp.tau)
        with torch.no_grad():
            self.Z[side] = torch.where(self.Z[side] == 0, scores.mean() * len(bank), self.Z[side])
        p, c, eps = scores / self.Z[side].clone(), (rows.shape[1] - 1) / len(bank), 1e-7
        return -(torch.log(p[:, 0] / (p[:, 0] + c + eps)).sum() + torch.log(c / (p[:, 1:] + c + eps)).sum()) / len(v)

    def negatives(self, labels: Tensor) -> Tensor:
        """(B,) -> (B, k) training ids, uniform over the images of other classes."""
        start = self.starts[labels][:, None]
        size = self.starts[labels + 1][:, None] - start
        r = (torch.rand(len(labels), self.hp.k, device=labels.device) * (len(self.by_class) - size)).long()
        return self.by_class[r + size * (r >= start)]


def unit(v: Tensor) -> Tensor:
    """(B, D) -> (B, D), unit norm, no epsilon."""
    return v / v.norm(dim=1, keepdim=True)
