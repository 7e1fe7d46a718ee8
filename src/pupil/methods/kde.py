"""KDE: match the direction of the embeddings (HeadSharing's kde).

Paper: Ben-Baruch et al., 2022, arXiv:2201.06945 (the authors' `kde`).
Loss: ce * CE + kl * KL(T) + beta * sum over the batch of |e_s / |e_s| - e_t / |e_t||^2, which is 2 - 2 cos(e_s, e_t) for
each image.  A sum and not a mean, as the authors': its weight grows with the batch.
Trained: the student.  Deployed: the student.
Defaults: ours, after those of thkd (ce 1, kl 1.5, beta 0.02: at a batch of 64 about the mean over the images); the authors
give no weights.  Deviations: none; the embeddings must be equally wide.
"""

from dataclasses import dataclass

from torch import Tensor

from pupil.methods.base import Method, Setup, same_width
from pupil.methods.heads import kde
from pupil.types import Batch, Features


class KDE(Method):
    paper = "Ben-Baruch et al., 2022, arXiv:2201.06945"
    needs_same_classes = False

    @dataclass(frozen=True)
    class Config(Method.Config):
        kl: float = 1.5
        beta: float = 0.02

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        same_width("kde", setup, "use srrl or crd, which project, or a pair of equal width")

    def knowledge(self, s: Features, t: Features, batch: Batch) -> Tensor:
        return kde(s.embedding, t.embedding)
