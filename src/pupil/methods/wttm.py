"""WTTM: match the teacher's softened probabilities with a student that is not softened, smooth targets first.

Paper: Zheng & Yang, ICLR 2024, arXiv:2402.11148.
Loss: ce * CE + kl * KL(T) + beta * mean_b u_b KL(p_b || softmax(z_s)), p = softmax(z_t / T) and u_b = sum_c P_bc^(1/T)
with P = softmax(z_t): the flatter the teacher's answer the greater u.  Without `weighted` u = 1 (the paper's TTM).
Trained: the student.  Deployed: the student.
Defaults: ours (ce 1, beta 1, T 4); the paper chooses T and beta for each pair.
Deviations: none.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from pupil.methods.base import Method
from pupil.types import Batch, Features


class WTTM(Method):
    paper = "Zheng & Yang, ICLR 2024, arXiv:2402.11148"
    on_logits = True

    @dataclass(frozen=True)
    class Config(Method.Config):
        beta: float = 1.0
        weighted: bool = True  # false: TTM

    def knowledge(self, s: Features, t: Features, batch: Batch) -> Tensor:
        z, T = t.logits.float(), self.hp.T
        divergence = F.kl_div(s.logits.float().log_softmax(1), (z / T).log_softmax(1), reduction="none", log_target=True).sum(1)
        u = ((z / T).logsumexp(1) - z.logsumexp(1) / T).exp() if self.hp.weighted else 1.0
        return (u * divergence).mean()
