"""MLKD: match predictions per image, per batch and per class, on a weak and a strong view of each image.

Paper: Jin, Wang & Lin, CVPR 2023, Multi-Level Logit Distillation.
Loss: ce * [CE(weak) + CE(strong)] + beta * (instance + class + batch), with P = softmax(z / T), T in (T, 3, 5, 2, 6),
  instance = m sum_T KL_T(weak) + [KL_T + KL_3 + KL_5](strong) + [KL_2 + KL_6](weak)
  class = c sum_T |P_t' P_t - P_s' P_s|^2 / K        batch = m sum_T |P_t P_t' - P_s P_s'|^2 / B      (both weak)
m: share of images whose teacher is no surer than the batch's median; c: share of classes likewise by summed probability.
Trained: the student.  Deployed: the student.
Defaults: the authors' for CIFAR-100 (ce 0.1, beta 0.9, T 4); `imagenet`: 0.5, 0.5, T 1; `ls`: with standardised logits in
the KL terms (Sun et al., CVPR 2024), T 2, beta 9.
Deviations: none.  As in the authors' code m and c scale sums that are already reduced, the strong view's last two
temperatures read the weak view, and its class and batch terms are left out.  Their epochs and rates: 240, lr 0.025 (480,
0.01 for MobileNetV2), drops at 150, 180 and 210 all the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pupil.methods.base import Loss, Method, Setup
from pupil.methods.functions import kl, product, standardised
from pupil.types import Batch, Features, Term, Terms, UserError

FURTHER = (3.0, 5.0, 2.0, 6.0)  # temperatures beside the main one


class MLKD(Method):
    paper = "Jin, Wang & Lin, CVPR 2023"
    two_views = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "imagenet": {"ce": 0.5, "beta": 0.5, "T": 1.0},
        "ls": {"beta": 9.0, "T": 2.0, "standardise": True},
    }

    @dataclass(frozen=True)
    class Config(Method.Config):
        ce: float = 0.1
        beta: float = 0.9
        standardise: bool = False  # logits of the KL terms

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        if hp.kl:
            raise UserError(f"hp.mlkd.kl must be 0, got {hp.kl}: mlkd has KL terms of its own, which beta weighs")

    def forward(self, batch: Batch, t: Features, loss: Loss) -> Terms:
        assert batch.strong is not None, "the loader gives two views"
        s_weak, s_strong = self.student.features(batch.images), self.student.features(batch.strong)
        with torch.no_grad():
            t_strong = self.teacher.features(batch.strong)
        return loss(both(s_weak, s_strong), both(t, t_strong), batch)

    def loss(self, s: Features, t: Features, batch: Batch) -> Terms:
        """`s`, `t`: logits (2B, K), the weak views' first."""
        (weak_s, strong_s), (weak_t, strong_t) = s.logits.float().chunk(2), t.logits.float().chunk(2)
        ce = F.cross_entropy(weak_s, batch.labels) + F.cross_entropy(strong_s, batch.labels)
        sure = weak_t.softmax(1)
        m, c = share_below_median(sure.amax(1)), share_below_median(sure.sum(0))
        temperatures = (self.hp.T, *FURTHER)
        level = standardised if self.hp.standardise else torch.Tensor.float
        kl_weak = [kl(level(weak_s), level(weak_t), T) for T in temperatures]
        kl_strong = [kl(level(strong_s), level(strong_t), T) for T in temperatures[:3]]
        soft = [((weak_s / T).softmax(1), (weak_t / T).softmax(1)) for T in temperatures]
        own = {
            "instance": m * torch.stack(kl_weak).sum() + torch.stack([*kl_strong, *kl_weak[3:]]).sum(),
            "class": c * torch.stack([gram_gap(p_s.T, p_t.T) for p_s, p_t in soft]).sum(),
            "batch": m * torch.stack([gram_gap(p_s, p_t) for p_s, p_t in soft]).sum(),
        }
        terms = {"ce": Term(ce, self.hp.ce)} if self.hp.ce else {}
        return terms | {name: Term(raw, self.hp.beta) for name, raw in own.items() if self.hp.beta}


def both(weak: Features, strong: Features) -> Features:
    return weak._replace(logits=torch.cat([weak.logits, strong.logits]))


def gram_gap(a: Tensor, b: Tensor) -> Tensor:
    """|b b' - a a'|^2 / n of two (n, d) matrices, a scalar."""
    return (product(b, b.T) - product(a, a.T)).square().sum() / len(a)


def share_below_median(x: Tensor) -> Tensor:
    """The share of the values of (N,) that do not exceed their median, a scalar; half, or more where values are equal."""
    ranked = x.sort().values  # the bits of quantile(0.5), which makes the host wait in torch 2.11
    return (x <= ranked[(len(x) - 1) // 2].lerp(ranked[len(x) // 2], 0.5)).float().mean()
