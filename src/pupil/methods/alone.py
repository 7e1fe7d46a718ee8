"""No teacher: a network on labels.  Trains teachers, baselines and SH-KD's teacher."""

import torch.nn.functional as F
from torch import Tensor, nn

from pupil.methods.base import Answers, Group, Loss, Phase, Pictures
from pupil.net import Net
from pupil.types import Batch, Features, Term, Terms


class Alone(nn.Module):
    two_views = False

    def __init__(self, student: Net) -> None:
        super().__init__()
        self.student = student

    def phases(self) -> list[Phase]:
        return [Phase("train", cross_entropy, [Group(self.student)])]

    def observed(self) -> dict[str, Tensor]:
        return {}

    def answers(self) -> Answers:
        return {}

    def pictures(self) -> Pictures:
        return {}

    def forward(self, batch: Batch, t: None, loss: Loss) -> Terms:
        s = self.student.features(batch.images)
        return loss(s, s, batch)


def cross_entropy(s: Features, t: Features, batch: Batch) -> Terms:
    return {"ce": Term(F.cross_entropy(s.logits.float(), batch.labels), 1.0)}
