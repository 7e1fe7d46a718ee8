"""DKD: split KD into what the teacher says of the label's class and what it says of the others, and weigh each.

Paper: Zhao et al., CVPR 2022, arXiv:2203.08679.
Loss: ce * CE + kl * KL(T) + min(epoch / warmup, 1) * (alpha * TCKD + beta * NCKD), with p = softmax(z / T),
TCKD = T^2 KL between the two-way distributions [p_y, 1 - p_y] of teacher and student, and
NCKD = T^2 KL between their softmax(z / T) over the classes other than the label's; means over the batch.
Trained: the student.  Deployed: the student.
Defaults: mdistiller's, which is the authors' (ce 1, alpha 1, beta 8, T 4, 20 epochs of warm-up).  Presets: its beta of
each CIFAR-100 pair (lr 0.05; pairs with a MobileNet or ShuffleNet student 0.01) and of ImageNet (lr 0.2, batches of 512);
ctkd with beta 2.
Deviations: none in value.  The others' softmax leaves the label's class out, where the authors' subtracts 1000 from its
logit, and TCKD is computed from log-odds, where theirs takes logarithms of probabilities that may have become 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from pupil.methods.base import Method, Setup
from pupil.methods.functions import label_and_others
from pupil.types import Batch, Features, Term, Terms, UserError


class DKD(Method):
    paper = "Zhao et al., CVPR 2022, arXiv:2203.08679"
    on_logits = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mdistiller": {},
        "ctkd": {"beta": 2.0},
        "imagenet": {"beta": 0.5, "T": 1.0, "warmup": 1},
        "imagenet_resnet34-imagenet_resnet18": {"beta": 0.5, "T": 1.0, "warmup": 1},
        "imagenet_resnet50-mobilenet_v1": {"beta": 2.0, "T": 1.0, "warmup": 1},
        "resnet56-resnet20": {"beta": 2.0},
        "resnet110-resnet32": {"beta": 2.0},
        "wrn_40_2-wrn_16_2": {"beta": 6.0},
        "wrn_40_2-wrn_40_1": {"beta": 6.0},
        "vgg13-vgg8": {"beta": 6.0},
        "vgg13-MobileNetV2": {"beta": 6.0},
        "resnet32x4-resnet8x4": {},
        "resnet32x4-ShuffleV1": {},
        "resnet32x4-ShuffleV2": {},
        "wrn_40_2-ShuffleV1": {},
        "ResNet50-MobileNetV2": {},
    }

    @dataclass(frozen=True)
    class Config(Method.Config):
        alpha: float = 1.0  # of the label's class
        beta: float = 8.0  # of the other classes
        warmup: int = 20  # epochs until both weights are reached; epoch 1 has 1 / warmup of them

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        if hp.alpha < 0:
            raise UserError(f"dkd: hp.dkd.alpha must be 0 or more, got {hp.alpha}")
        if hp.warmup < 1:
            raise UserError(f"dkd: hp.dkd.warmup must be 1 epoch (none) or more, got {hp.warmup}")

    def loss(self, s: Features, t: Features, batch: Batch) -> Terms:
        hp, terms = self.hp, self.usual(s, t, batch)
        share = min(batch.epoch / hp.warmup, 1.0)
        tckd, nckd = decoupled(s.logits, t.logits, batch.labels, hp.T)
        own = {"tckd": Term(tckd, share * hp.alpha), "nckd": Term(nckd, share * hp.beta)}
        return terms | {name: term for name, term in own.items() if term.weight}


def decoupled(logits_s: Tensor, logits_t: Tensor, labels: Tensor, T: float | Tensor) -> tuple[Tensor, Tensor]:
    """(B, K), (B, K), (B,) -> TCKD and NCKD, scalars; finite wherever the logits are."""
    odds_s, others_s = label_and_others(logits_s.float() / T, labels)
    odds_t, others_t = label_and_others(logits_t.float() / T, labels)
    is_label = odds_t.sigmoid() * (F.logsigmoid(odds_t) - F.logsigmoid(odds_s))
    is_other = (-odds_t).sigmoid() * (F.logsigmoid(-odds_t) - F.logsigmoid(-odds_s))
    nckd = F.kl_div(others_s, others_t, reduction="batchmean", log_target=True)
    return (is_label + is_other).mean() * T**2, nckd * T**2
