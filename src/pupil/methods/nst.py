"""NST: the channels of the student are distributed as those of the teacher, by where in the image they fire.

Paper: Huang & Wang, 2017, arXiv:1707.01219.
Loss: ce * CE + kl * KL(T) + beta * sum over stages of [ mean k(t, t) + mean k(s, s) - 2 mean k(s, t) ], the squared maximum
mean discrepancy with k(a, b) = <a, b>^2, where a and b are channels (flattened over positions, unit norm) and the means
are over samples and pairs of channels; of two maps the larger is average-pooled to the smaller first.
Trained: the student.  Deployed: the student.
Defaults: RepDistiller's (ce 1, kl 0, beta 50).  Presets: spot-adaptive with kl 1; mdistiller the same.
Deviations: the kernels are batched matrix products, which need C^2 instead of C^2 H W numbers a sample.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from pupil.methods.base import Method, Setup, paired_spots
from pupil.methods.functions import product, same_size
from pupil.types import Batch


class NST(Method):
    paper = "Huang & Wang, 2017, arXiv:1707.01219"
    needs_same_classes = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "repdistiller": {},
        "spot-adaptive": {"kl": 1.0},
        "mdistiller": {},
    }

    @dataclass(frozen=True)
    class Config(Method.Config):
        beta: float = 50.0

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        self.spots = paired_spots("nst", setup)

    def match(self, i: int, f_s: Tensor, f_t: Tensor, batch: Batch) -> Tensor:
        f_s, f_t = same_size(f_s.float(), f_t.float())
        a, b = F.normalize(f_s.flatten(2), dim=2), F.normalize(f_t.flatten(2), dim=2)
        return kernel(b, b) + kernel(a, a) - 2 * kernel(a, b)


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """(B, C1, N), (B, C2, N) -> the mean of <a_q, b_p>^2."""
    return product(a, b.mT).square().mean()
