"""CSKD: a student of some of the teacher's classes learns them renormalised, and embeddings that keep classes apart.

Paper: Wang, Rhodes & Feng, ACCV 2022, Class Specialized Knowledge Distillation.
Loss: ce * CE + kl * T^2 KL(softmax(q / T) || softmax(z_s / T)) + beta * (opl * OPL + icv * ICV).  q are the teacher's
logits of the student's classes, so that its probabilities are renormalised over these (`data.classes` with
`data.teacher_classes`; with the same classes it is plain KD).  Of the student's embeddings e, with u = e / |e|:
OPL = 1 - (mean <u_i, u_j> over pairs i, j of one class) + gamma * (the same mean over pairs of two classes), a mean being
sum / (pairs + 1e-6); ICV = sum over classes of |V|, where V holds, for each image of the class in the batch, the
unbiased variance of e over its features.
Trained: the student.  Deployed: the student.
Defaults: those of the authors' command line (1, 0.2, 0.2, 0.2, T 1).  Preset: readme, the 0.1 of their example.  Their
recipe, for teacher and student: 200 epochs in batches of 128, lr 0.1, momentum 0.9, weight decay 5e-4, schedule step with
milestones 60, 120, 160 and gamma 0.2; cskd_wrn_40_2 -> cskd_wrn_16_1 at 32 pixels, imagenet_resnet18 to 152 at 224.
Deviations: icv_axis samples is what the name intra-class variance says, V holding for each feature the unbiased variance
over the images of the class, 0 for a single image.  The authors' renumbering, which merges classes of CIFAR and CUB, is
`data.relabel: cskd`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pupil.methods.base import Method, Setup
from pupil.methods.functions import product
from pupil.types import Batch, Features, Term, Terms, UserError

SHORTEST = 1e-6  # length of an embedding that has a direction
AXES = ("features", "samples")


class CSKD(Method):
    paper = "Wang, Rhodes & Feng, ACCV 2022"
    needs_same_classes = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"cskd": {}, "readme": {"kl": 0.1, "opl": 0.1, "icv": 0.1}}

    @dataclass(frozen=True)
    class Config(Method.Config):
        kl: float = 0.2
        T: float = 1.0
        beta: float = 1.0  # times both of the following
        opl: float = 0.2  # weight of the orthogonal projection
        icv: float = 0.2  # weight of the intra-class variance
        gamma: float = 0.5  # of pairs of two classes, over those of one
        icv_axis: str = "features"  # features: the authors' variance, of each image; samples: of each feature

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        if hp.icv_axis not in AXES:
            raise UserError(f"cskd: hp.cskd.icv_axis must be features or samples, got {hp.icv_axis!r}")

    def loss(self, s: Features, t: Features, batch: Batch) -> Terms:
        hp, terms = self.hp, self.usual(s, t, batch)
        classes = torch.arange(s.logits.shape[1], device=s.logits.device)
        members = (batch.labels[:, None] == classes).float()  # as one_hot, which reads the labels' range on the CPU
        if hp.beta * hp.opl:
            terms["opl"] = Term(orthogonality(s.embedding, batch.labels, hp.gamma), hp.beta * hp.opl)
        if hp.beta * hp.icv:
            icv = variance_of_images if hp.icv_axis == "features" else variance_within
            terms["icv"] = Term(icv(s.embedding, members), hp.beta * hp.icv)
        return terms


def orthogonality(e: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """(B, D), (B,) -> a scalar, 0 where classes are parallel in themselves and at right angles to each other."""
    u = F.normalize(e.float(), dim=1, eps=SHORTEST)
    cosine, same = product(u, u.T), labels[:, None] == labels
    other = ~same
    same = same & ~torch.eye(len(e), dtype=torch.bool, device=e.device)
    means = [(cosine * pairs).sum() / (pairs.sum() + 1e-6) for pairs in (same, other)]
    return 1 - means[0] + gamma * means[1]


def variance_of_images(e: Tensor, members: Tensor) -> Tensor:
    """(B, D), (B, K) with a 1 at the label -> the sum over classes of the norm of its images' variances over D."""
    return lengths(product(members.T, e.float().var(1, keepdim=True).square())).sum()


def variance_within(e: Tensor, members: Tensor) -> Tensor:
    """The same of each feature's variance over the images of the class."""
    e, images = e.float(), members.sum(0)[:, None]
    centres = product(members.T, e) / images.clamp(min=1)
    squares = product(members.T, (e - product(members, centres)).square())
    return lengths((squares / (images - 1).clamp(min=1)).square().sum(1)).sum()


def lengths(squares: Tensor) -> Tensor:
    """Square roots, with a gradient of 0 at 0."""
    some = squares > 0
    return squares.where(some, 1.0).sqrt().where(some, 0.0)
