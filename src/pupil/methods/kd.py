"""KD: match the temperature-softened class probabilities.

Paper: Hinton, Vinyals & Dean, NIPS workshop 2014, arXiv:1503.02531.
Loss: ce * CE(z_s, y) + kl * T^2 KL(softmax(z_t / T) || softmax(z_s / T)), the KL summed over classes, mean over the batch.
Trained: the student.  Deployed: the student.
Defaults: 0.1 CE + 0.9 KL at T = 4, RepDistiller's, mdistiller's and CTKD's.  Presets: simkd with ce 1 and kl 1; imagenet,
mdistiller's 0.5 and 0.5 at T 1.
Deviations: none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pupil.methods.base import Method


class KD(Method):
    paper = "Hinton et al., NIPS-W 2014, arXiv:1503.02531"
    on_logits = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "repdistiller": {},
        "simkd": {"ce": 1.0, "kl": 1.0},
        "mdistiller": {},
        "imagenet": {"ce": 0.5, "kl": 0.5, "T": 1.0},
        "ctkd": {},
        "ls": {"kl": 1.0},
    }

    @dataclass(frozen=True)
    class Config(Method.Config):
        ce: float = 0.1
        kl: float = 0.9
