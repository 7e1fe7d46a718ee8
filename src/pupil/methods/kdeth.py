"""KDETH: match the direction of the embeddings, and make sense to the teacher's classifier (HeadSharing's kdeth).

Paper: Ben-Baruch et al., 2022, arXiv:2201.06945 (the authors' `kdeth`).
Loss: ce * CE(z_s) + kl * KL_T(z_s, z_t) + beta * (the sum of kde) + delta * KL_T'(W_t e_s + b_t, z_t), W_t and b_t the
teacher's frozen classifier.
Trained: the student.  Deployed: the student, and with mix > 0 the teacher's classifier beside its own, as by thkd.
Defaults: ours, after those of thkd (ce 1, kl 1.5, beta 0.02, delta 0.02, T = T' = 4); the authors give no weights.
Deviations: with beta 0 the term that delta weighs stays (the authors' is left out as well); the embeddings must be
equally wide.
"""

from dataclasses import dataclass

from torch import Tensor

from pupil.methods.heads import AddsTeachersHead, kde
from pupil.types import Batch, Features


class KDETH(AddsTeachersHead):
    paper = "Ben-Baruch et al., 2022, arXiv:2201.06945"

    @dataclass(frozen=True)
    class Config(AddsTeachersHead.Config):
        kl: float = 1.5
        beta: float = 0.02

    def knowledge(self, s: Features, t: Features, batch: Batch) -> Tensor:
        return kde(s.embedding, t.embedding)
