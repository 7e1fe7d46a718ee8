"""USKD: soft labels without a teacher, from the student's own probabilities and those of a weak head.

Paper: Yang et al., ICCV 2023, arXiv:2303.13005.
Loss: ce * CE + alpha * LABEL + beta * OTHERS + mu * WEAK, where p = softmax(z_s) and w is the weak head's softmax:
LABEL = - mean P ln p[y] with P = p[y]^2 + 1 - (mean of p[y]^2 over the batch);
OTHERS = - mean sum over classes c other than y of Z[c] ln q[c], q the softmax of z_s over those classes alone, Z = 1 / rank
scaled to sum 1 over them, the rank of c (1: the largest) among all classes by w[c] / (1 - w[y]) + p[c] / (1 - p[y]);
WEAK = cross-entropy of w with the label smoothed to 0.9 + 0.1 / K.  P and Z are constants for the gradient.
Trained: the student and the weak head, one linear layer on the pooled map of the last stage but one.
Deployed: the student.  The teacher is ignored, unless kl is given.
Defaults: the authors' for ImageNet (ce 1, alpha 1, beta 0.1, mu 0.005); preset cifar, theirs for CIFAR-100, 0.1 for each.
Deviations: the ranks follow the paper; the authors' code has ln p in the place of p there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pupil.methods.base import Method, Setup
from pupil.methods.functions import label_and_others
from pupil.types import Batch, Features, Term, Terms, UserError


class USKD(Method):
    paper = "Yang et al., ICCV 2023, arXiv:2303.13005"
    needs_same_classes = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"imagenet": {}, "cifar": {"alpha": 0.1, "beta": 0.1, "mu": 0.1}}

    @dataclass(frozen=True)
    class Config(Method.Config):
        alpha: float = 1.0  # of the label's class
        beta: float = 0.1  # of the other classes
        mu: float = 0.005  # of the weak head

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        if len(setup.s.maps) < 2:
            raise UserError(
                f"uskd needs a student with the maps of two stages or more, and {setup.student.name or 'it'} gives"
                f" {len(setup.s.maps)}; use kd, dkd or nkd"
            )
        if hp.alpha < 0 or hp.mu <= 0:
            raise UserError(f"uskd: hp.uskd.alpha must be 0 or more and mu greater than 0, got {hp.alpha} and {hp.mu}")
        self.weak_head = nn.Linear(setup.s.maps[-2].shape[1], setup.s.logits.shape[1])

    def loss(self, s: Features, t: Features, batch: Batch) -> Terms:
        hp, terms, labels = self.hp, self.usual(s, t, batch), batch.labels
        weak = self.weak_head(s.maps[-2].mean((2, 3))).float()
        odds, others = label_and_others(s.logits, labels)
        target = odds.detach().sigmoid().square()
        ranks = zipf(s.logits.detach().float().softmax(1), weak.detach().softmax(1), labels)
        own = {
            "label": Term(-((target + 1 - target.mean()) * F.logsigmoid(odds)).mean(), hp.alpha),
            "others": Term(-(ranks * others).sum(1).mean(), hp.beta),
            "weak": Term(F.cross_entropy(weak, labels, label_smoothing=0.1), hp.mu),
        }
        return terms | {name: term for name, term in own.items() if term.weight}


def zipf(p: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """(B, K) probabilities of the student and of the weak head, (B,) -> (B, K) weights of the classes: sum 1, label's 0."""
    label = labels[:, None]
    likely = torch.stack([x / (1 - x.gather(1, label) + 1e-6) for x in (p, w)]).sum(0)
    rank = likely.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    weights = (1 / (rank + 1)).scatter(1, label, 0.0)
    return weights / weights.sum(1, keepdim=True)
