"""PKT: the probability of picking one image as another's neighbour is the teacher's.

Paper: Passalis & Tefas, ECCV 2018, arXiv:1803.10837.
Loss: ce * CE + kl * KL(T) + beta * mean over B^2 pairs of P_t ln((P_t + 1e-7) / (P_s + 1e-7)), with P the matrix of
(cos(e_i, e_j) + 1) / 2, diagonal included, each row divided by its sum.
Trained: the student.  Deployed: the student.
Defaults: RepDistiller's (ce 1, kl 0, beta 30000).  Presets: spot-adaptive and simkd (its authors' SemCKD) with kl 1; ctkd
with ce 0.1 and kl 0.9; mdistiller the same.
Deviations: cosines that rounding puts below -1 count as -1.  beta belongs to the mean over all pairs: the divergence of
a row is B times as large, and P itself falls as 1/B.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from pupil.methods.base import Method
from pupil.methods.functions import product
from pupil.types import Batch

EPS = 1e-7  # of norms and probabilities


class PKT(Method):
    paper = "Passalis & Tefas, ECCV 2018, arXiv:1803.10837"
    needs_same_classes = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "repdistiller": {},
        "simkd": {"kl": 1.0},
        "spot-adaptive": {"kl": 1.0},
        "mdistiller": {},
        "ctkd": {"ce": 0.1, "kl": 0.9},
    }

    @dataclass(frozen=True)
    class Config(Method.Config):
        beta: float = 30000.0

    spots = (-1,)

    def match(self, i: int, f_s: Tensor, f_t: Tensor, batch: Batch) -> Tensor:
        p_s, p_t = neighbours(f_s), neighbours(f_t)
        return (p_t * ((p_t + EPS) / (p_s + EPS)).log()).mean()


def neighbours(e: Tensor) -> Tensor:
    """(B, D) -> (B, B) probabilities; rows sum to one."""
    e = e.float()
    e = e / (e.norm(dim=1, keepdim=True) + EPS)
    similar = ((product(e, e.T) + 1) / 2).clamp(min=0)
    return similar / similar.sum(1, keepdim=True)
