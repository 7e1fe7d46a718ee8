"""KDMSE: match the class probabilities by mean squared error.

Paper: Ben-Baruch et al., 2022, arXiv:2201.06945 (the authors' `kdmse`, one of their baselines).
Loss: ce * CE + kl * KL(T) + beta * mean (softmax(z_s) - softmax(z_t))^2, over every element, at temperature 1.
Trained: the student.  Deployed: the student.
Defaults: ours (ce 1, kl 0, beta 1); the authors give no weights.  At beta 1 the term is weak, the mean of K squares of
probabilities: with many classes a beta of K or more weighs it like the cross-entropy.
Deviations: none.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from pupil.methods.base import Method
from pupil.types import Batch, Features


class KDMSE(Method):
    paper = "Ben-Baruch et al., 2022, arXiv:2201.06945"
    on_logits = True

    @dataclass(frozen=True)
    class Config(Method.Config):
        beta: float = 1.0

    def knowledge(self, s: Features, t: Features, batch: Batch) -> Tensor:
        return F.mse_loss(s.logits.float().softmax(1), t.logits.float().softmax(1))
