"""What HeadSharing's methods have in common: the teacher's frozen classifier on the student's embedding.

Ben-Baruch et al., 2022, arXiv:2201.06945.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pupil.methods.base import Answers, Method, Setup, same_width
from pupil.methods.functions import kl
from pupil.net import FrozenLinear, Net
from pupil.types import Batch, Features, Term, Terms, UserError


class TeachersHead(Method):
    """Has the teacher's classifier, and deploys it beside the student's own where `mix` is not 0."""

    @dataclass(frozen=True)
    class Config(Method.Config):
        T_head: float = 4.0  # temperature of the term with the teacher's classifier
        mix: float = 0.0  # 0: own classifier; 1: the teacher's

    def __init__(self, setup: Setup, hp: Any) -> None:
        super().__init__(setup, hp)
        self.teacher_head = FrozenLinear.of(setup.teacher.head)
        if isinstance(self.student, TwoHeads):
            self.student.teacher_head.load_state_dict(self.teacher_head.state_dict())

    @classmethod
    def plan(cls, setup: Setup, hp: Any) -> dict[str, Any]:
        name = cls.__name__.lower()
        same_width(name, setup, "use simkd, which projects, or a pair of equal width")
        if not 0 <= hp.mix <= 1:
            raise UserError(f"{name}: hp.{name}.mix must be from 0 (own classifier) to 1 (the teacher's), got {hp.mix}")
        if hp.mix and hp.head == "frozen":
            raise UserError(f"{name}: hp.{name}.head=frozen makes both classifiers the teacher's; mix must be 0, got {hp.mix}")
        if hp.T_head <= 0:
            raise UserError(f"{name}: hp.{name}.T_head must be greater than 0, got {hp.T_head}")
        return {"mix": hp.mix, "width": setup.t.embedding.shape[1], "classes": setup.t.logits.shape[1]} if hp.mix else {}

    @staticmethod
    def deployed(net: Net, mix: float = 0.0, width: int = 0, classes: int = 0) -> Net:
        return TwoHeads(net, FrozenLinear(width, classes), mix) if mix else net

    def kdth(self, s: Features, t: Features) -> Tensor:
        """KL_T'(W_t e_s + b_t, z_t): a scalar."""
        return kl(self.teacher_head(s.embedding), t.logits, self.hp.T_head)

    def answers(self) -> Answers:
        """Those of own head, teacher's head and both (half each, if `mix` does not say) that are not what is deployed."""
        if self.hp.head == "frozen":
            return {}

        def by(mix: float) -> Callable[[Tensor], Tensor]:
            return lambda images: both_heads(self.student.features(images), self.teacher_head, mix)

        share = self.hp.mix if 0 < self.hp.mix < 1 else 0.5
        shares = {"own_head": 0.0, "teachers_head": 1.0, "both_heads": share}
        return {name: by(mix) for name, mix in shares.items() if mix != self.hp.mix}


class AddsTeachersHead(TeachersHead):
    """Has the term with the teacher's classifier beside one of its own."""

    @dataclass(frozen=True)
    class Config(TeachersHead.Config):
        delta: float = 0.02  # weight of the term with the teacher's classifier

    @classmethod
    def plan(cls, setup: Setup, hp: Any) -> dict[str, Any]:
        if hp.delta < 0:
            raise UserError(f"hp.{cls.__name__.lower()}.delta: expected 0 or more, got {hp.delta}")
        return super().plan(setup, hp)

    def loss(self, s: Features, t: Features, batch: Batch) -> Terms:
        terms = super().loss(s, t, batch)
        return terms | {"teachers_head": Term(self.kdth(s, t), self.hp.delta)} if self.hp.delta else terms


class TwoHeads(Net):
    """A network that answers with its own classifier and the teacher's.

    In training, and as a teacher, its logits (`features`) are its own classifier's.  `mix`, the share of the teacher's, may
    be set to another value after the training.
    """

    classifiers = ("head", "teacher_head")

    def __init__(self, net: Net, teacher_head: FrozenLinear, mix: float) -> None:
        super().__init__(net.stem, list(net.stages), net.head, net.neck, net.pool)  # type: ignore[arg-type]
        self.teacher_head, self.mix = teacher_head, mix
        self.name, self.pools_last = net.name, net.pools_last

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, K) log-probabilities."""
        return both_heads(self.features(x), self.teacher_head, self.mix)


def both_heads(f: Features, teacher_head: FrozenLinear, mix: float) -> Tensor:
    """(B, K) log-probabilities: of (1 - mix) times the softmax of the own logits + mix times the teacher's classifier's."""
    both = torch.stack([f.logits, teacher_head(f.embedding)]).float().log_softmax(2)
    shares = torch.tensor([1 - mix, mix], device=both.device)
    return (both + shares.log()[:, None, None]).logsumexp(0)


def kde(e_s: Tensor, e_t: Tensor) -> Tensor:
    """Sum over all elements of the squared difference of two batches of embeddings (B, D) of unit norm: a scalar."""
    return (F.normalize(e_s.float()) - F.normalize(e_t.float())).square().sum()
