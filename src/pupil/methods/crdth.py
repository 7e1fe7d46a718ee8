"""CRDTH: CRD, and make sense to the teacher's classifier (HeadSharing's crdth).

Paper: Ben-Baruch et al., 2022, arXiv:2201.06945 (the authors' `crdth`).
Loss: ce * CE(z_s) + kl * KL_T(z_s, z_t) + beta * (the loss of crd) + delta * KL_T'(W_t e_s + b_t, z_t), W_t and b_t the
teacher's frozen classifier.
Trained: the student and the two embeddings of crd.  Deployed: the student, and with mix > 0 the teacher's classifier beside
its own, as by thkd.
Defaults: the authors' for resnet32x4 -> resnet8x4 (ce 0.9, kl 1, beta 0.8, delta 0.02, T = T' = 4), the rest as crd's.
Deviations: those of crd; with beta 0 the term that delta weighs stays (the authors' is left out as well); the
embeddings must be equally wide.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pupil.methods.contrast import Contrast
from pupil.methods.heads import AddsTeachersHead


class CRDTH(Contrast, AddsTeachersHead):
    paper = "Ben-Baruch et al., 2022, arXiv:2201.06945"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"headsharing": {}, "resnet32x4-resnet8x4": {}}

    @dataclass(frozen=True)
    class Config(Contrast.Config, AddsTeachersHead.Config):
        ce: float = 0.9
        kl: float = 1.0
