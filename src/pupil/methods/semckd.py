"""SemCKD: every map of the student imitates all maps of the teacher, and attention learns which of them how much.

Paper: Chen et al., AAAI 2021, arXiv:2012.03236.
Loss: ce * CE + kl * KL(T) + beta / (B S) * sum over images b, student's maps i and teacher's maps j of w_bij *
mean (P_ij(f_s_i) - f_t_j)^2.  Of two maps the larger is average-pooled to the smaller first.  w_bij is the softmax over j of
q_i[b] . k_j[b] / soft, where q_i[b] and k_j[b], of unit norm, are made by an MLP (one for each map) from row b of the map's
Gram matrix A A^T, A (B, CHW): how much image b is like each other image of the batch.
Trained: the student, the MLPs and the projections P_ij (1x1, 3x3, 1x1 convolutions with batch norm).
Deployed: the student.
Defaults: the authors' in SimKD's suite (ce 1, kl 1, beta 400, soft 1).  Presets: imagenet with beta 50.
Deviations: the batch size is in the shapes of the MLPs, so in a batch of another size, the last of an epoch, this term is
0 and ce and kl train alone (the authors leave that batch out); the logged mean of the term counts it as 0.  The layers
that the authors' MLPs own and never use do not exist.  As theirs, the student's Gram matrices carry gradients.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pupil.methods.base import Method, Setup, needs_maps
from pupil.methods.functions import product, same_size
from pupil.types import Batch, Features, UserError


class SemCKD(Method):
    paper = "Chen et al., AAAI 2021, arXiv:2012.03236"
    remembers = ("attention",)
    needs_same_classes = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"simkd": {}, "imagenet": {"beta": 50.0}}

    @dataclass(frozen=True)
    class Config(Method.Config):
        kl: float = 1.0
        beta: float = 400.0
        soft: float = 1.0  # temperature of the attention
        factor: int = 4  # queries and keys have batch_size / factor dimensions

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        needs_maps("semckd", setup)
        b, n = setup.batch_size, len(setup.labels)
        if not 1 <= hp.factor <= b:
            raise UserError(f"semckd: hp.semckd.factor must be from 1 to the batch size of {b}, got {hp.factor}")
        if hp.soft <= 0:
            raise UserError(f"semckd: hp.semckd.soft must be greater than 0, got {hp.soft}")
        if n < b:
            raise UserError(f"semckd works on full batches of {b}, and there are {n} training images; lower optim.batch_size")
        c_s, c_t = ([f.shape[1] for f in features.maps] for features in (setup.s, setup.t))
        self.queries = nn.ModuleList(embedding(b, b // hp.factor) for _ in c_s)
        self.keys = nn.ModuleList(embedding(b, b // hp.factor) for _ in c_t)
        self.project = nn.ModuleList(nn.ModuleList(projection(c_in, c_out) for c_out in c_t) for c_in in c_s)
        self.attention: Tensor | None = None  # (S, T) of the last full batch, mean over images

    def knowledge(self, s: Features, t: Features, batch: Batch) -> Tensor:
        if len(s.logits) != self.setup.batch_size:
            return 0.0 * s.logits.float().sum()
        w = self.attend(s, t)
        self.attention = w.detach().mean(0)
        return (w * self.differences(s, t)).sum(2).mean()

    def attend(self, s: Features, t: Features) -> Tensor:
        """(B, S, T): for every image and map of the student shares of the teacher's maps."""
        q, k = rows(self.queries, s.maps), rows(self.keys, t.maps)
        return (product(q, k.mT) / self.hp.soft).softmax(2)

    def differences(self, s: Features, t: Features) -> Tensor:
        """(B, S, T): mean squared differences of every image for every pair of maps."""
        found = [self.difference(i, j, f_s, f_t) for i, f_s in enumerate(s.maps) for j, f_t in enumerate(t.maps)]
        return torch.stack(found, 1).unflatten(1, (len(s.maps), len(t.maps)))

    def difference(self, i: int, j: int, f_s: Tensor, f_t: Tensor) -> Tensor:
        a, b = same_size(f_s, f_t)
        project: nn.Module = self.project[i][j]  # type: ignore[index]
        return (project(a).float() - b.float()).square().mean((1, 2, 3))

    def observed(self) -> dict[str, Tensor]:
        return {} if self.attention is None else {"attention": self.attention}


def rows(embeddings: nn.ModuleList, maps: tuple[Tensor, ...]) -> Tensor:
    """Maps (B, C, H, W) -> (B, maps, D): the rows of their Gram matrices, embedded."""
    flat = [f.flatten(1) for f in maps]
    with torch.autocast(maps[0].device.type, enabled=False):
        return torch.stack([F.normalize(e(product(f, f.mT))) for e, f in zip(embeddings, flat, strict=True)], 1)


def embedding(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(c_in, 2 * c_out), nn.ReLU(), nn.Linear(2 * c_out, c_out))


def projection(c_in: int, c_out: int) -> nn.Sequential:
    mid = 2 * c_out
    return nn.Sequential(
        nn.Conv2d(c_in, mid, 1, bias=False),
        nn.BatchNorm2d(mid),
        nn.ReLU(),
        nn.Conv2d(mid, mid, 3, 1, 1, bias=False),
        nn.BatchNorm2d(mid),
        nn.ReLU(),
        nn.Conv2d(mid, c_out, 1, bias=False),
    )
