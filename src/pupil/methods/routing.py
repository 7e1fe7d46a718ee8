"""One image through two networks at once: at every spot a policy decides whose tensor goes on.

Spots are indices of `Features.taps`; what is cut is a `Net`, from one tap to a later one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pupil.methods.adapters import regressor
from pupil.methods.base import Setup
from pupil.net import Net, evaluating
from pupil.types import UserError

EPS = 1e-20  # in both logarithms of the noise
LEAN = 10.0  # of a policy that begins by distilling
TEACHER = 0  # of the two routes


class Policy(nn.Module):
    """A route for each image at each of `gates` places, from both embeddings; `lean`: nearly all by the teacher at first."""

    def __init__(self, width: int, gates: int, tau: float, lean: bool = False) -> None:
        super().__init__()
        self.net = nn.Linear(width, 2 * gates)
        self.tau = tau
        if lean:
            lean_to_teacher(self.net)

    def scores(self, e_s: Tensor, e_t: Tensor) -> Tensor:
        """(B, D_s), (B, D_t) -> (B, gates, 2) logits of the routes; no gradient reaches the embeddings."""
        return self.net(torch.cat([e_t, e_s], 1).detach()).float().unflatten(1, (-1, 2))

    def sampled(self, e_s: Tensor, e_t: Tensor) -> Tensor:
        """(B, gates): 1 for the teacher's route, 0 for the student's, with the gradient of the soft choice."""
        scores = self.scores(e_s, e_t)
        return straight_through(relaxed(scores, torch.rand_like(scores), self.tau))[..., TEACHER]

    def likeliest(self, e_s: Tensor, e_t: Tensor) -> Tensor:
        """(B, gates): as `sampled`, without noise."""
        return (self.scores(e_s, e_t).argmax(2) == TEACHER).float()


@torch.no_grad()
def lean_to_teacher(layer: nn.Linear) -> None:
    """Adds to the bias of every teacher's route."""
    layer.bias[TEACHER::2] += LEAN


def relaxed(scores: Tensor, uniform: Tensor, tau: float) -> Tensor:
    """(..., n) logits, (..., n) uniform numbers -> (..., n) soft samples: the softmax at tau of logits with Gumbel noise."""
    noise = -torch.log(-torch.log(uniform + EPS) + EPS)
    return ((scores + noise) / tau).softmax(-1)


def straight_through(soft: Tensor) -> Tensor:
    """(..., n) soft samples -> one-hot ones with their gradient."""
    hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return (hard - soft).detach() + soft


class Crossing(nn.Module):
    """Adapters both ways at every spot, and the walk over both networks that they make possible."""

    def __init__(self, name: str, setup: Setup, spots: Sequence[int], deep: bool = False) -> None:
        super().__init__()
        nets, shapes = (setup.student, setup.teacher), (setup.s.taps, setup.t.taps)
        self.spots = [[range(len(taps))[spot] for spot in spots] for taps in shapes]  # of student and teacher, from 0
        for net, places in zip(nets, self.spots, strict=True):
            refuse_what_cannot_be_cut(name, net, places)
        pairs = [(setup.s.taps[i].shape, setup.t.taps[j].shape) for i, j in zip(*self.spots, strict=True)]
        for a, b in pairs:
            if len(a) != len(b):
                raise UserError(
                    f"{name}: a spot is a map of one network and the embedding of the other: {tuple(a)}, {tuple(b)}"
                )
        self.to_teacher = nn.ModuleList(adapter(a, b, deep) for a, b in pairs)
        self.to_student = nn.ModuleList(adapter(b, a, deep) for a, b in pairs)

    def forward(self, student: Net, teacher: Net, images: Tensor, gates: Tensor, f_t: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) and gates (B, spots + 1), 1 for the teacher's route -> logits (B, K).

        `f_t`: the teacher's tensor at the first spot, where it is known.
        """
        x_s = x_t = images
        at_s = at_t = -1
        for k, (i, j) in enumerate(zip(*self.spots, strict=True)):
            h_s = walk(student, x_s, at_s, i)
            h_t = walk(teacher, x_t, at_t, j) if k or f_t is None else f_t
            g = gates[:, k].view(-1, *[1] * (h_s.dim() - 1))
            x_t = (1 - g) * self.to_teacher[k](h_s) + g * h_t
            x_s = (1 - g) * h_s + g * self.to_student[k](h_t)
            at_s, at_t = i, j
        z_s, z_t = (walk(net, x, at, len(net.stages) + 2) for net, x, at in ((student, x_s, at_s), (teacher, x_t, at_t)))
        return (1 - gates[:, -1:]) * z_s + gates[:, -1:] * z_t


def adapter(src: Sequence[int], dst: Sequence[int], deep: bool) -> nn.Module:
    """From a tensor of one network towards that of the other."""
    return regressor(src, dst, grow=True, deep=deep) if len(src) == 4 else nn.Linear(src[1], dst[1])


def walk(net: Net, x: Tensor, start: int, end: int) -> Tensor:
    """From the tap at `start` to the one at `end`; -1 are the images, one past the embedding the logits."""
    deepest = len(net.stages)
    for i in range(start, end):
        if i < 0:
            x = net.stem(x)
        elif i > deepest:
            x = net.head(x)
        else:
            x = net.stages[i - 1].onward(x) if i else x  # type: ignore[operator]
            x = net.stages[i].to_map(x) if i < deepest else net.pool(net.neck(x))[1]  # type: ignore[operator]
    return x


def refuse_what_cannot_be_cut(name: str, net: Net, places: Sequence[int]) -> None:
    if any(a >= b for a, b in pairwise(places)):
        raise UserError(f"{name}: spots must go deeper one by one, got {list(places)} of {len(net.stages) + 2} taps")
    seen = [i for i in places if 0 < i <= len(net.stages) and not isinstance(net.stages[i - 1].view, nn.Identity)]
    if seen:
        raise UserError(
            f"{name} cannot cut {net.name or 'the network'} at spot {seen[0]}, where tokens go on and not a map; wrap a method"
            " on embeddings: rkd, pkt, cc or crd"
        )


@contextmanager
def frozen(*nets: Net) -> Iterator[None]:
    """For a while the networks are in eval mode, and what is computed with them gives their weights no gradient."""
    trained = [p for net in nets for p in net.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        with evaluating(nn.ModuleList(nets)):
            yield
    finally:
        for p in trained:
            p.requires_grad_(True)
