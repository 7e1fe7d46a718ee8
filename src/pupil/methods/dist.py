"""DIST: the student's probabilities need only correlate with the teacher's, per image and per class.

Paper: Huang et al., NeurIPS 2022, arXiv:2205.10536.
Loss: ce * CE + kl * KL(T) + beta * (inter * INTER + intra * INTRA), with p = softmax(z / T),
INTER = T^2 (1 - mean over images of corr(p_s, p_t) across the classes) and
INTRA = T^2 (1 - mean over classes of corr(p_s, p_t) across the batch);
corr(a, b) = sum (a - mean a)(b - mean b) / (|a - mean a| |b - mean b| + 1e-8), Pearson's.
Trained: the student.  Deployed: the student.
Defaults: the authors' for CIFAR-100 (ce 1, beta 2, inter 1, intra 1, T 4); preset imagenet with T 1.
Deviations: none.  A batch of one image has no correlation across the batch: INTRA is T^2 there and trains nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from pupil.methods.base import Method, Setup
from pupil.types import Batch, Features, Term, Terms, UserError


class DIST(Method):
    paper = "Huang et al., NeurIPS 2022, arXiv:2205.10536"
    on_logits = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"cifar": {}, "imagenet": {"T": 1.0}}

    @dataclass(frozen=True)
    class Config(Method.Config):
        beta: float = 2.0
        inter: float = 1.0  # share of the correlations per image
        intra: float = 1.0  # share of the correlations per class

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        if hp.inter < 0 or hp.intra < 0:
            raise UserError(f"dist: hp.dist.inter and intra must be 0 or more, got {hp.inter} and {hp.intra}")

    def loss(self, s: Features, t: Features, batch: Batch) -> Terms:
        hp, terms = self.hp, self.usual(s, t, batch)
        p_s, p_t = ((f.logits.float() / hp.T).softmax(1) for f in (s, t))
        own = {
            "inter": Term((1 - correlation(p_s, p_t).mean()) * hp.T**2, hp.beta * hp.inter),
            "intra": Term((1 - correlation(p_s.T, p_t.T).mean()) * hp.T**2, hp.beta * hp.intra),
        }
        return terms | {name: term for name, term in own.items() if term.weight}


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """(N, D), (N, D) -> (N,) Pearson's correlation of each pair of rows; 0 where a row is constant."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)
