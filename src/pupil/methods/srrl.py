"""SRRL: make the student's embedding, through a connector, usable by the teacher's classifier.

Paper: Yang et al., ICLR 2021, OpenReview ZzwDy_wiWv.
Loss: ce * CE + kl * KL(T) + beta * [ mean (r - e_t)^2 + mean (W_t r + b_t - z_t)^2 ], each over every element, with the
connector's r = ReLU(BN(C e_s)) and the teacher's frozen classifier W_t, b_t.
Trained: the student and the connector (1x1 convolution C without bias, batch norm).  Deployed: the student with its own
classifier.
Defaults: SimKD's suite (ce 1, kl 1, beta 1).  Preset: ctkd with ce 0.1 and kl 0.9.
Deviations: a batch of one image, which has no variance, is normalised by the running statistics (the authors' fails).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from pupil.methods.base import Method, Setup
from pupil.net import FrozenLinear
from pupil.types import Batch, Features


class SRRL(Method):
    paper = "Yang et al., ICLR 2021, OpenReview ZzwDy_wiWv"
    needs_same_classes = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"simkd": {}, "ctkd": {"ce": 0.1, "kl": 0.9}}

    @dataclass(frozen=True)
    class Config(Method.Config):
        kl: float = 1.0
        beta: float = 1.0

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        w_s, w_t = setup.s.embedding.shape[1], setup.t.embedding.shape[1]
        self.connect = nn.Sequential(nn.Conv2d(w_s, w_t, 1, bias=False), Norm(w_t), nn.ReLU())
        self.teacher_head = FrozenLinear.of(setup.teacher.head)

    def knowledge(self, s: Features, t: Features, batch: Batch) -> Tensor:
        r = self.connect(s.embedding[:, :, None, None])[:, :, 0, 0]
        return F.mse_loss(r.float(), t.embedding.float()) + F.mse_loss(self.teacher_head(r).float(), t.logits.float())


class Norm(nn.BatchNorm2d):
    """Batch norm of (B, C, 1, 1) that takes a batch of one by its running statistics."""

    def forward(self, input: Tensor) -> Tensor:
        if len(input) > 1 or not self.training:
            return super().forward(input)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
