"""RKD: images stand to each other in the student's embedding as they do in the teacher's.

Paper: Park et al., CVPR 2019, arXiv:1904.05068.
Loss: ce * CE + kl * KL(T) + beta * (distance * L_d + angle * L_a).  L_d is the mean over B^2 pairs of the smooth L1
between the distances |e_i - e_j|, each network's divided by its mean distance; L_a the mean over B^3 triples of the smooth
L1 between the cosines of the angle at e_i towards e_j and e_k (0 where two coincide).  One image alone gives 0.
Trained: the student.  Deployed: the student.
Defaults: RepDistiller's (ce 1, kl 0, beta 1, distance 25, angle 50).  Presets: spot-adaptive and simkd (its authors'
SemCKD) with kl 1; mdistiller the same.
Deviations: vectors shorter than 1e-6 (RepDistiller: 1e-12) count as too short to have a direction, so that equal
embeddings give no huge gradients; the spot-adaptive suite's NaN on a batch of one image is 0 here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pupil.methods.base import Method
from pupil.methods.functions import product
from pupil.types import Batch

SHORTEST = 1e-6  # distance: of equal embeddings too


class RKD(Method):
    paper = "Park et al., CVPR 2019, arXiv:1904.05068"
    needs_same_classes = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "repdistiller": {},
        "simkd": {"kl": 1.0},
        "spot-adaptive": {"kl": 1.0},
        "mdistiller": {},
    }

    @dataclass(frozen=True)
    class Config(Method.Config):
        beta: float = 1.0
        distance: float = 25.0  # weight of the distances
        angle: float = 50.0  # weight of the angles

    spots = (-1,)

    def match(self, i: int, f_s: Tensor, f_t: Tensor, batch: Batch) -> Tensor:
        e_s, e_t = f_s.flatten(1).float(), f_t.flatten(1).float()
        distance = F.smooth_l1_loss(distances(e_s), distances(e_t))
        return self.hp.distance * distance + self.hp.angle * F.smooth_l1_loss(angles(e_s), angles(e_t))


def distances(e: Tensor) -> Tensor:
    """(B, D) -> (B, B) Euclidean distances over their mean; the diagonal is 0 and not in the mean."""
    square = e.square().sum(1)
    d = (square[:, None] + square - 2 * product(e, e.T)).clamp(min=SHORTEST**2).sqrt()
    d = d.masked_fill(torch.eye(len(e), dtype=torch.bool, device=e.device), 0.0)
    mean = d.sum() / max(len(e) * (len(e) - 1), 1)
    return d / mean.clamp(min=SHORTEST)


def angles(e: Tensor) -> Tensor:
    """(B, D) -> (B, B, B): entry ijk is the cosine of the angle at e_i between e_j and e_k."""
    towards = F.normalize(e - e[:, None], dim=2, eps=SHORTEST)
    return product(towards, towards.mT)
