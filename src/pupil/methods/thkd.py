"""TH-KD: the student's embedding must make sense to the teacher's classifier (HeadSharing's kdth).

Paper: Ben-Baruch et al., 2022, arXiv:2201.06945 (the authors' `kdth`).
Loss: ce * CE(z_s) + kl * KL_T(z_s, z_t) + beta * KL_T'(W_t e_s + b_t, z_t), W_t and b_t the teacher's frozen classifier.
Trained: the student.  Deployed: the student, and with mix > 0 the teacher's classifier beside its own, averaged in
probability: (1 - mix) softmax(z_s) + mix softmax(W_t e_s + b_t), given as log-probabilities.
Scored beside what is deployed: the own classifier, the teacher's, and both (val/own_head, val/teachers_head, val/both_heads,
half each if mix does not say; the same of test).  `python -m pupil import FOLDER --mix M` chooses again after the training.
Defaults: the authors' for resnet32x4 -> resnet8x4 (ce 1, kl 1.5, beta 0.02, T = T' = 4; their mix is 0 and used in
validation only).  Deviations: none; the embeddings must be equally wide.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from pupil.methods.heads import TeachersHead
from pupil.types import Batch, Features


class THKD(TeachersHead):
    paper = "Ben-Baruch et al., 2022, arXiv:2201.06945"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"headsharing": {}, "resnet32x4-resnet8x4": {}}

    @dataclass(frozen=True)
    class Config(TeachersHead.Config):
        kl: float = 1.5
        beta: float = 0.02

    def knowledge(self, s: Features, t: Features, batch: Batch) -> Tensor:
        return self.kdth(s, t)
