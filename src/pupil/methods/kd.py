"""KD: match the temperature-softened class probabilities.

Paper: Hinton, Vinyals & Dean, NIPS workshop 2014, arXiv:1503.02531.
Loss: ce * CE(z_s, y) + kl * T^2 KL(softmax(z_t / T) || softmax(z_s / T)), the KL summed over classes, mean over the batch.
Trained: the student.  Deployed: the student.
Defaults: 0.1 CE + 0.9 KL at T = 4, RepDistiller's and mdistiller's (SimKD's suite uses 1 and 1).  Deviations: none.
"""

from dataclasses import dataclass

from pupil.methods.base import Method


class KD(Method):
    paper = "Hinton et al., NIPS-W 2014, arXiv:1503.02531"

    @dataclass(frozen=True)
    class Config(Method.Config):
        ce: float = 0.1
        kl: float = 0.9
