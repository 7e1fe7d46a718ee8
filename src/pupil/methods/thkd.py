"""TH-KD: the student's embedding must make sense to the teacher's classifier.

Paper: Ben-Baruch et al., 2022, arXiv:2201.06945 (the authors' `kdth`).
Loss: ce * CE(z_s) + kl * KL_T(z_s, z_t) + beta * KL_T'(W_t e_s + b_t, z_t), W_t and b_t the teacher's frozen classifier.
Trained: the student.  Deployed: the student, and with mix > 0 the teacher's classifier beside its own, averaged in
probability: (1 - mix) softmax(z_s) + mix softmax(W_t e_s + b_t), given as log-probabilities.
Defaults: the authors' for resnet32x4 -> resnet8x4 (ce 1, kl 1.5, beta 0.02, T = T' = 4; their mix is 0 and used in
validation only).  Deviations: none; the embeddings must be equally wide.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pupil.methods.base import Method, Setup, kl, same_width
from pupil.net import FrozenLinear, Net
from pupil.types import Batch, Features, UserError


class THKD(Method):
    paper = "Ben-Baruch et al., 2022, arXiv:2201.06945"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"headsharing": {}, "resnet32x4-resnet8x4": {}}

    @dataclass(frozen=True)
    class Config(Method.Config):
        kl: float = 1.5
        beta: float = 0.02
        T_head: float = 4.0  # temperature of the term with the teacher's classifier
        mix: float = 0.0  # 0: own classifier; 1: the teacher's

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        self.teacher_head = FrozenLinear.of(setup.teacher.head)
        if isinstance(self.student, TwoHeads):
            self.student.teacher_head.load_state_dict(self.teacher_head.state_dict())

    @classmethod
    def plan(cls, setup: Setup, hp: Config) -> dict[str, Any]:
        same_width("thkd", setup, "use simkd, which projects, or a pair of equal width")
        if not 0 <= hp.mix <= 1:
            raise UserError(f"thkd: hp.thkd.mix must be from 0 (own classifier) to 1 (the teacher's), got {hp.mix}")
        if hp.T_head <= 0:
            raise UserError(f"thkd: hp.thkd.T_head must be greater than 0, got {hp.T_head}")
        return {"mix": hp.mix, "width": setup.t.embedding.shape[1], "classes": setup.t.logits.shape[1]} if hp.mix else {}

    @staticmethod
    def deployed(net: Net, mix: float = 0.0, width: int = 0, classes: int = 0) -> Net:
        return TwoHeads(net, FrozenLinear(width, classes), mix) if mix else net

    def knowledge(self, s: Features, t: Features, batch: Batch) -> Tensor:
        return kl(self.teacher_head(s.embedding), t.logits, self.hp.T_head)


class TwoHeads(Net):
    """A network that answers with its own classifier and the teacher's; in training its logits are its own."""

    def __init__(self, net: Net, teacher_head: FrozenLinear, mix: float) -> None:
        super().__init__(net.stem, list(net.stages), net.head, net.neck, net.pool)  # type: ignore[arg-type]
        self.teacher_head, self.mix = teacher_head, mix

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, K) log-probabilities."""
        f = self.features(x)
        both = torch.stack([f.logits, self.teacher_head(f.embedding)]).float().log_softmax(2)
        shares = torch.tensor([1 - self.mix, self.mix], device=x.device)
        return (both + shares.log()[:, None, None]).logsumexp(0)
