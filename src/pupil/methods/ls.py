"""LS: standardise the logits of student and teacher before a method compares them.

Paper: Sun et al., CVPR 2024, arXiv:2403.01427.
Loss: ce * CE(z_s) + beta * (the wrapped method's other terms at (z - mean z) / (std z + 1e-7), of both networks, with
the unbiased standard deviation over the classes and temperature T).  ce and beta multiply the wrapped method's weights.
Trained: what the wrapped method (`of`: kd, dkd, dist, nkd, kdmse) trains.  Deployed: the student.
Defaults: the authors' for KD (0.1 CE + 9 KL, T 2); the presets are their (T, w) of each CIFAR-100 pair, for DKD with
its beta in `of_beta`.
Deviations: none.  MLKD standardises inside: hp.mlkd.preset=ls.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch.nn.functional as F

from pupil.methods.base import Method, Setup
from pupil.methods.functions import standardised
from pupil.methods.wrapping import Wrapper, weighed, wrap
from pupil.types import Batch, Features, Term, Terms, UserError


def pair(T: float, w: float, of_beta: float | None = None) -> dict[str, Any]:
    """The authors' (T, w) for `of: kd`, or (T, w, DKD's beta) for `of: dkd`."""
    dkd = {} if of_beta is None else {"of_beta": of_beta}
    return {"T": T, "beta": w, **dkd}


class LS(Method):
    paper = "Sun et al., CVPR 2024, arXiv:2403.01427"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "dkd": pair(2, 9, 8),
        "resnet32x4-resnet8x4": pair(2, 9),
        "vgg13-vgg8": pair(3, 9),
        "wrn_40_2-wrn_40_1": pair(2, 9),
        "wrn_40_2-wrn_16_2": pair(2, 9),
        "resnet56-resnet20": pair(2, 9),
        "resnet110-resnet32": pair(2, 9),
        "resnet110-resnet20": pair(4, 12),
        "resnet32x4-ShuffleV2": pair(2, 9),
        "resnet32x4-wrn_16_2": pair(3, 9),
        "resnet32x4-wrn_40_2": pair(3, 9),
        "wrn_40_2-resnet8x4": pair(2, 9),
        "wrn_40_2-MobileNetV2": pair(3, 9),
        "vgg13-MobileNetV2": pair(3, 9),
        "ResNet50-MobileNetV2": pair(3, 1),
        "dkd-resnet32x4-resnet8x4": pair(2, 9, 8),
        "dkd-vgg13-vgg8": pair(2, 15, 2),
        "dkd-wrn_40_2-wrn_40_1": pair(2, 12, 2),
        "dkd-wrn_40_2-wrn_16_2": pair(2, 12, 2),
        "dkd-resnet56-resnet20": pair(3, 18, 2),
        "dkd-resnet110-resnet32": pair(2, 15, 2),
        "dkd-resnet110-resnet20": pair(2, 15, 2),
        "dkd-resnet32x4-ShuffleV2": pair(2, 9, 8),
        "dkd-resnet32x4-wrn_16_2": pair(2, 9, 2),
        "dkd-resnet32x4-wrn_40_2": pair(2, 9, 8),
        "dkd-wrn_40_2-resnet8x4": pair(2, 18, 2),
        "dkd-wrn_40_2-MobileNetV2": pair(2, 15, 2),
        "dkd-vgg13-MobileNetV2": pair(3, 9, 2),
        "dkd-ResNet50-MobileNetV2": pair(2, 15, 2),
    }

    @dataclass(frozen=True)
    class Config(Wrapper):
        beta: float = 9.0
        T: float = 2.0
        of_beta: float = 0.0  # the beta of the wrapped method, if it has one; 0: its preset's

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        self.inner = wrap("ls", setup, hp)
        if not self.inner.on_logits:
            more = "; hp.mlkd.preset=ls does that for mlkd" if hp.of == "mlkd" else ""
            raise UserError(f"hp.ls.of: ls wraps a method on logits (kd, dkd, dist, nkd, kdmse), got {hp.of!r}{more}")
        if hp.of_beta and not self.inner.hp.beta:
            raise UserError(f"hp.ls.of_beta and the presets dkd-... are for hp.ls.of=dkd, got of={hp.of}, which has no beta")
        if hp.of_beta:
            self.inner.hp = replace(self.inner.hp, beta=hp.of_beta)

    def loss(self, s: Features, t: Features, batch: Batch) -> Terms:
        self.inner.hp = replace(self.inner.hp, T=self.hp.T)
        level_s, level_t = (f._replace(logits=standardised(f.logits)) for f in (s, t))
        terms = self.inner.loss(level_s, level_t, batch)
        if "ce" in terms:
            terms["ce"] = Term(F.cross_entropy(s.logits.float(), batch.labels), terms["ce"].weight)
        return weighed(terms, self.hp)
