"""CC: make the student's distance to the teacher small for an image and its neighbour in the batch at once.

Paper: Peng et al., ICCV 2019, arXiv:1904.01802.
Loss: ce * CE + kl * KL(T) + beta * 1/(B - 1) sum_b <d_b, d_(b+1)>, with d_b = |W_s e_s + b_s - W_t e_t - b_t| of image b,
element by element; a batch of one image has no neighbours and gives 0.
Trained: the student and both embeddings (W_s, b_s), (W_t, b_t).  Deployed: the student.
Defaults: RepDistiller's (ce 1, kl 0, beta 0.02, 128 dimensions).  Presets: spot-adaptive and simkd (its authors'
SemCKD) with kl 1.
Deviations: none from the code of those suites.  The paper compares full correlation matrices of the batch; these
products of neighbours, which depend on the order of the batch and can shrink to 0 because both embeddings are trained,
are what the published CC numbers come from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from pupil.methods.base import Method, Setup
from pupil.types import Batch, Features, UserError


class CC(Method):
    paper = "Peng et al., ICCV 2019, arXiv:1904.01802"
    needs_same_classes = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "repdistiller": {},
        "simkd": {"kl": 1.0},
        "spot-adaptive": {"kl": 1.0},
    }

    @dataclass(frozen=True)
    class Config(Method.Config):
        beta: float = 0.02
        dim: int = 128  # of both embeddings

    spots = (-1,)

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        if hp.dim < 1:
            raise UserError(f"cc: hp.cc.dim must be positive, got {hp.dim}; the authors' is 128")
        self.embed_s = nn.Linear(setup.s.embedding.shape[1], hp.dim)
        self.embed_t = nn.Linear(setup.t.embedding.shape[1], hp.dim)

    def compared(self, s: Features, t: Features) -> list[tuple[Tensor, Tensor]]:
        return [(self.embed_s(s.embedding), self.embed_t(t.embedding))]

    def match(self, i: int, f_s: Tensor, f_t: Tensor, batch: Batch) -> Tensor:
        """`f_s` and `f_t`: embedded."""
        d = (f_s.float() - f_t.float()).abs()
        return (d[:-1] * d[1:]).sum() / max(len(d) - 1, 1)
