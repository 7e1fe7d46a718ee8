"""NKD: cross-entropy with the teacher's probability of the label, and with its normalised probabilities of the others.

Paper: Yang et al., ICCV 2023, arXiv:2303.13005.
Loss: ce * CE + kl * KL(T) + beta * (L_t + gamma * L_n), with L_t = - mean p_t[y] ln p_s[y] at temperature 1 and
L_n = - T^2 mean sum over classes c other than y of q_t[c] ln q_s[c], where q = softmax(z / T) over those classes alone.
Trained: the student.  Deployed: the student.
Defaults: the authors' for ImageNet, ResNet34 -> ResNet18 (ce 1, beta 1, gamma 1.5, T 1); preset cifar, theirs for
CIFAR-100 with the same networks, T 3 and gamma 3.5.
Deviations: none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from pupil.methods.base import Method, Setup
from pupil.methods.functions import label_and_others
from pupil.types import Batch, Features, Term, Terms, UserError


class NKD(Method):
    paper = "Yang et al., ICCV 2023, arXiv:2303.13005"
    on_logits = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "imagenet": {},
        "imagenet_resnet34-imagenet_resnet18": {},
        "cifar": {"T": 3.0, "gamma": 3.5},
        "ResNet34-ResNet18": {"T": 3.0, "gamma": 3.5},
    }

    @dataclass(frozen=True)
    class Config(Method.Config):
        T: float = 1.0
        beta: float = 1.0
        gamma: float = 1.5  # of the other classes, beside 1 of the label's

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        if hp.gamma < 0:
            raise UserError(f"nkd: hp.nkd.gamma must be 0 or more, got {hp.gamma}")

    def loss(self, s: Features, t: Features, batch: Batch) -> Terms:
        hp, terms = self.hp, self.usual(s, t, batch)
        label, others = normalised(s.logits, t.logits, batch.labels, hp.T)
        own = {"label": Term(label, hp.beta), "others": Term(others, hp.beta * hp.gamma)}
        return terms | {name: term for name, term in own.items() if term.weight}


def normalised(logits_s: Tensor, logits_t: Tensor, labels: Tensor, T: float | Tensor) -> tuple[Tensor, Tensor]:
    """(B, K), (B, K), (B,) -> L_t and L_n, scalars."""
    odds_s, odds_t = (label_and_others(z, labels)[0] for z in (logits_s, logits_t))
    others_s, others_t = (label_and_others(z.float() / T, labels)[1] for z in (logits_s, logits_t))
    label = -(odds_t.sigmoid() * F.logsigmoid(odds_s)).mean()
    return label, -(others_t.exp() * others_s).sum(1).mean() * T**2
