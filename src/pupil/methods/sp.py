"""SP: images that look alike to the teacher look alike to the student.

Paper: Tung & Mori, ICCV 2019, arXiv:1907.09682.
Loss: ce * CE + kl * KL(T) + beta * |G(f_s) - G(f_t)|^2 / B^2, with G(f) = F F^T, each row scaled to unit norm, where
row b of F is the flattened map of image b and B the size of this batch.
Trained: the student.  Deployed: the student.
Defaults: RepDistiller's (ce 1, kl 0, beta 3000, the last maps).  Presets: simkd and spot-adaptive with kl 1; ctkd with
ce 0.1 and kl 0.9; mdistiller the same.  layers `all` adds up every stage and the embedding.
Deviations: none.  The loss is that of a batch: B is the true size, also of a last and smaller one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from pupil.methods.base import Method, Setup, needs_maps, paired_spots
from pupil.methods.functions import product
from pupil.types import Batch, UserError


class SP(Method):
    paper = "Tung & Mori, ICCV 2019, arXiv:1907.09682"
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
        beta: float = 3000.0
        layers: str = "last"  # last: the last map; all: the map of every stage, and the embedding

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        needs_maps("sp", setup)
        if hp.layers not in ("last", "all"):
            raise UserError(f"sp: hp.sp.layers must be last or all, got {hp.layers!r}")
        self.spots = (-2,) if hp.layers == "last" else (*paired_spots("sp", setup), -1)

    def match(self, i: int, f_s: Tensor, f_t: Tensor, batch: Batch) -> Tensor:
        return F.mse_loss(similarity(f_s), similarity(f_t))  # over B^2 entries


def similarity(f: Tensor) -> Tensor:
    """(B, ...) -> (B, B), rows of unit norm."""
    rows = f.flatten(1)
    return F.normalize(product(rows, rows.T))
