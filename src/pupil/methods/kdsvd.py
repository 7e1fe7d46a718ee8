"""KDSVD: the leading singular vectors of one stage stand to those of the next as they do in the teacher.

Paper: Lee, Kim & Song, ECCV 2018, arXiv:1807.06819.
Loss: ce * CE + kl * KL(T) + beta * sum over i > 1 of 1/B sum (R_i(s) - R_i(t))^2, with R_i the kernel
exp(-(v_i[p] - v_(i-1)[q])^2 / 8) between the entries of the vectors of consecutive stages.  v_i are the k leading right
singular vectors of the teacher's map as a matrix (positions x channels); for the student, of its k + 3 leading ones, those
most parallel to the teacher's, with their sign.  Both are scaled by the teacher's singular values, of unit norm over k.
Trained: the student.  Deployed: the student.
Defaults: mdistiller's weights (ce 1, kl 0, beta 1; RepDistiller gives none), RepDistiller's matrix and k = 1.  Presets:
mdistiller (axis width: vectors over the columns of the map, with channels and rows as positions), spot-adaptive (kl 1).
Deviations: a singular vector has no sign, and the loss depends on the teacher's; here the entry of largest magnitude is
positive, so the loss does not hang on a linear algebra library.  The vectors come from an eigendecomposition of the
smaller Gram matrix, with the exact gradient of the leading ones alone, damped where eigenvalues coincide.  Infinite values
are not hidden as zeros.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pupil.methods.base import Method, Setup, needs_maps, paired_maps
from pupil.methods.functions import product
from pupil.types import Batch, Features, UserError

GAP = 1e-6  # between eigenvalues, of their sum: below it the gradient is damped
RANK = 1e-10  # of an eigenvalue, of their sum: below it the vector is rounding noise
SPARE = 3  # how many more vectors of the student there are to choose from


class KDSVD(Method):
    paper = "Lee et al., ECCV 2018, arXiv:1807.06819"
    needs_same_classes = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "repdistiller": {},
        "spot-adaptive": {"kl": 1.0},
        "mdistiller": {"axis": "width"},
    }

    @dataclass(frozen=True)
    class Config(Method.Config):
        beta: float = 1.0
        k: int = 1  # singular vectors of the teacher (the student's: 3 more)
        axis: str = "channels"  # what the singular vectors run over: channels | width

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        needs_maps("kdsvd", setup)
        pairs = paired_maps(setup.s, setup.t)
        if hp.axis not in ("channels", "width") or hp.k < 1:
            raise UserError(f"kdsvd: hp.kdsvd.axis must be channels or width, and k positive, got {hp.axis!r} and {hp.k}")
        ours, theirs = ([self.matrix(pair[side]).shape[2] for pair in pairs] for side in (0, 1))
        if len(pairs) < 2 or ours != theirs:
            other = "width" if hp.axis == "channels" else "channels"
            raise UserError(
                f"kdsvd needs two stages or more that agree in {hp.axis}, the student has {ours} and the teacher"
                f" {theirs}; try hp.kdsvd.axis={other}, or use nst or at"
            )
        self.spots = range(1, 1 + len(pairs))

    def compared(self, s: Features, t: Features) -> list[tuple[Any, Any]]:
        """Of each spot the bases of the stage before and of its own, of student and teacher."""
        ours, theirs = self.bases(s, t)
        before = [0, *range(len(ours) - 1)]
        return [((*ours[j], *ours[i]), (*theirs[j], *theirs[i])) for i, j in enumerate(before)]

    def match(self, i: int, f_s: Any, f_t: Any, batch: Batch) -> Tensor:
        """The first stage has none before it: 0."""
        (before_s, s), (before_t, t) = ((f[:2], f[2:]) for f in (f_s, f_t))
        return self.relations([before_s, s], [before_t, t])[0] if i else s[0].new_zeros(())

    def bases(self, s: Features, t: Features) -> tuple[list["Basis"], list["Basis"]]:
        """The leading singular values and vectors of each stage, of student and teacher."""
        n, pairs = self.hp.k, paired_maps(s, t)
        return [leading(self.matrix(f), n + SPARE) for f, _ in pairs], [leading(self.matrix(f), n) for _, f in pairs]

    def matrix(self, f: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, positions, axis)."""
        return f.flatten(2).mT if self.hp.axis == "channels" else f.flatten(1, 2)

    @staticmethod
    def relations(s: Sequence["Basis"], t: Sequence["Basis"]) -> list[Tensor]:
        """One loss, a scalar, for each stage but the first."""
        scaled = [F.normalize(values)[:, None] for values, _ in t]
        v_t = [v * scale for (_, v), scale in zip(t, scaled, strict=True)]
        v_s = [aligned(a, b) * scale for (_, a), (_, b), scale in zip(s, t, scaled, strict=True)]
        return [
            (kernel(v_s[i], v_s[i - 1]) - kernel(v_t[i], v_t[i - 1])).square().sum() / len(v_t[i]) for i in range(1, len(t))
        ]


Basis = tuple[Tensor, Tensor]  # (B, n) singular values, descending, without gradient; (B, D, n) vectors


def leading(x: Tensor, n: int) -> Basis:
    """(B, N, D) -> the n leading right singular vectors, or as many as there are, with their values.

    The vectors' values come from outside the graph.  Their gradient is that of perturbation theory to first order:
    dv_i = sum_j v_j <v_j, dA v_i> / (l_i - l_j) with A = x^T x, where every other j outside the span of x has l_j = 0.
    """
    x = x.float()
    size = x.detach().nan_to_num().flatten(1).norm(dim=1).clamp(min=1e-30)[:, None, None]
    x = x / size
    x0 = x.detach().nan_to_num()
    wide = x0.shape[2] > x0.shape[1]
    squares, u = torch.linalg.eigh(product(x0, x0.mT) if wide else product(x0.mT, x0))
    squares, u = squares.flip(1).clamp(min=0)[:, None], u.flip(2)  # of the singular values, descending
    v = product(x0.mT, u) * (squares > RANK) / squares.clamp(min=RANK).sqrt() if wide else u
    v = v * signs(v)
    first, v1 = squares[:, :, :n], v[:, :, :n]
    change = product(x.mT, product(x, v1))
    change = change - change.detach()  # zero; its gradient is that of A applied to the leading vectors
    within = product(v.mT, change)
    outside = change - product(v, within)
    v1 = v1 + product(v, within * inverse(first - squares.mT)) + outside * inverse(first)
    return (first.sqrt() * size)[:, 0], v1


def inverse(gap: Tensor) -> Tensor:
    """1 / gap, and 0 where there is none."""
    return gap / (gap.square() + GAP**2)


def signs(v: Tensor) -> Tensor:
    """(B, D, n) -> (B, 1, n): what makes the entry of largest magnitude of each column positive."""
    return v.gather(1, v.abs().argmax(1, keepdim=True)).sign()


def aligned(v_s: Tensor, v_t: Tensor) -> Tensor:
    """(B, D, n), (B, D, k) -> (B, D, k): for each of the teacher's vectors the most parallel one of the student's."""
    cosine = product(v_s.mT, v_t).detach()
    best = cosine.abs().argmax(1, keepdim=True)
    return v_s.gather(2, best.expand(-1, v_s.shape[1], -1)) * cosine.gather(1, best).sign()


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """(B, D1, k), (B, D2, k) -> (B, D1, D2, k), between 0 and 1."""
    return torch.exp(-(a[:, :, None] - b[:, None]).square() / 8)
