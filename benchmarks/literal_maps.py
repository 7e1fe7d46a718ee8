"""The methods on feature maps as their formulas read; see `literal`."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.literal import LOGITS_AND_EMBEDDINGS, Literal
from pupil.types import Batch, Features


def align(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape[2] > b.shape[2]:
        a = F.adaptive_avg_pool2d(a, (b.shape[2], b.shape[3]))
    elif a.shape[2] < b.shape[2]:
        b = F.adaptive_avg_pool2d(b, (a.shape[2], a.shape[3]))
    return a, b


def fitnet(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    (spot,) = m.spots
    a, b = align(m.regress(s.taps[spot]), t.taps[spot])
    return ((a - b) ** 2).mean()


def at(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    def attention(f: Tensor) -> Tensor:
        return F.normalize(f.pow(m.hp.p).mean(1).view(f.shape[0], -1))

    pairs = [align(f_s, f_t) for f_s, f_t in zip(s.maps, t.maps, strict=False)]
    return torch.stack([(attention(a) - attention(b)).pow(2).mean() for a, b in pairs]).sum()


def sp(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    rows_s, rows_t = s.maps[-1].flatten(1), t.maps[-1].flatten(1)
    g_s, g_t = F.normalize(torch.mm(rows_s, rows_s.t())), F.normalize(torch.mm(rows_t, rows_t.t()))
    return ((g_t - g_s) ** 2).sum() / len(rows_s) ** 2


def vid(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    losses = []
    for regress, log_scale, f_s, f_t in zip(m.regress, m.log_scale, s.maps, t.maps, strict=True):
        a, b = align(f_s, f_t)
        variance = (torch.log(1.0 + torch.exp(log_scale)) + 1e-5).view(1, -1, 1, 1)
        losses.append((0.5 * ((regress(a) - b) ** 2 / variance + torch.log(variance))).mean())
    return torch.stack(losses).sum()


def ab(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    n, margin, losses = len(m.connectors), m.hp.margin, []
    for i, (connector, f_s, f_t) in enumerate(zip(m.connectors, s.pre, t.pre, strict=True)):
        a, b = align(connector(f_s), f_t)
        above = (a + margin) ** 2 * ((a > -margin) & (b <= 0)).float()
        below = (a - margin) ** 2 * ((a <= margin) & (b > 0)).float()
        losses.append(2.0 ** (i - n + 1) * (above + below).sum() * 3 / (1000 * len(a)))
    return torch.stack(losses).sum()


def ft(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    def factor(f: Tensor) -> Tensor:
        return F.normalize(f.pow(m.hp.p1).mean(1).view(f.shape[0], -1))

    with torch.no_grad():
        theirs = m.paraphraser["encode"](t.maps[-1])
    a, b = align(m.translate(s.maps[-1]), theirs)
    return (factor(a) - factor(b)).abs().pow(m.hp.p2).mean()


def fsp(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    """Every product of two channels at every position: B x C x D x HW numbers."""

    def flows(maps: tuple[Tensor, ...]) -> list[Tensor]:
        pairs = [align(a, b) for a, b in pairwise(maps)]
        return [(b.flatten(2).unsqueeze(2) * a.flatten(2).unsqueeze(1)).mean(3) for a, b in pairs]

    both = zip(flows((s.stem, *s.maps)), flows((t.stem, *t.maps)), strict=True)
    return torch.stack([((g_s - g_t) ** 2).mean() for g_s, g_t in both]).sum()


def nst(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    """Every pair of channels at every position: B x C x C x HW numbers."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.unsqueeze(1) * b.unsqueeze(2)).sum(3).pow(2).mean()

    losses = []
    for f_s, f_t in zip(s.maps, t.maps, strict=False):
        a, b = (F.normalize(f.flatten(2), dim=2) for f in align(f_s, f_t))
        losses.append(kernel(b, b) + kernel(a, a) - 2 * kernel(a, b))
    return torch.stack(losses).sum()


def kdsvd(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    """Full decompositions.  The teacher's vectors, whose sign they leave open, get ours: the largest entry is positive."""
    k, found = m.hp.k, []
    for f_s, f_t in zip(s.maps, t.maps, strict=False):
        _, _, v_s = torch.linalg.svd(f_s.flatten(2).transpose(1, 2), full_matrices=False)
        _, size, v_t = torch.linalg.svd(f_t.flatten(2).transpose(1, 2), full_matrices=False)
        v_s, v_t, size = v_s.transpose(1, 2)[:, :, : k + 3], v_t.transpose(1, 2)[:, :, :k], F.normalize(size[:, :k], dim=1)
        v_t = v_t * v_t.gather(1, v_t.abs().argmax(1, keepdim=True)).sign()
        cosine = torch.bmm(v_s.transpose(1, 2), v_t)
        best = F.one_hot(cosine.abs().argmax(1), cosine.shape[1]).transpose(1, 2)
        v_s = torch.bmm(v_s, (cosine.sign() * best).detach())
        found.append((v_s * size.unsqueeze(1), v_t * size.unsqueeze(1)))
    losses = []
    for (s0, t0), (s1, t1) in pairwise(found):
        r_s = torch.exp(-((s1.unsqueeze(2) - s0.unsqueeze(1)) ** 2) / 8)
        r_t = torch.exp(-((t1.unsqueeze(2) - t0.unsqueeze(1)) ** 2) / 8)
        losses.append(((r_s - r_t) ** 2).sum() / len(s1))
    return torch.stack(losses).sum()


def semckd(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    def embedded(layer: Any, f: Tensor) -> Tensor:
        rows = f.flatten(1)
        v = layer(torch.mm(rows, rows.t()))
        return v / v.pow(2).sum(1, keepdim=True).pow(0.5)

    B, queries = len(s.logits), [embedded(layer, f) for layer, f in zip(m.queries, s.maps, strict=True)]
    keys, total = [embedded(layer, f) for layer, f in zip(m.keys, t.maps, strict=True)], torch.zeros((), device=s.stem.device)
    for i, f_s in enumerate(s.maps):
        weight = F.softmax(torch.stack([(queries[i] * key).sum(1) for key in keys], 1) / m.hp.soft, 1)
        for j, f_t in enumerate(t.maps):
            a, b = align(f_s, f_t)
            total = total + (weight[:, j] * ((m.project[i][j](a) - b) ** 2).mean((1, 2, 3))).sum()
    return total / (B * len(s.maps))


def simkd(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    a, b = align(m.student.neck(s.maps[-1]), t.maps[-1])
    return ((a - b) ** 2).mean()


def ofd(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    n, losses = len(m.connectors), []
    for i, (connector, f_s, f_t) in enumerate(zip(m.connectors, s.pre[-len(m.connectors) :], t.pre, strict=True)):
        a = connector(f_s)
        b, margin = F.adaptive_avg_pool2d(f_t, (a.shape[2], a.shape[3])), m.get_buffer(f"margin_{i}").view(1, -1, 1, 1)
        low = (a - margin) ** 2 * ((a > margin) & (b <= margin)).float()
        middle = (a - b) ** 2 * ((a > b) & (b > margin) & (b <= 0)).float()
        high = (a - b) ** 2 * (b > 0).float()
        losses.append((low + middle + high).mean(0).sum() / 2 ** (n - 1 - i))
    return torch.stack(losses).sum()


def reviewkd(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    ours = [s.embedding.unsqueeze(2).unsqueeze(3), *reversed(s.maps)]
    theirs = [t.embedding.unsqueeze(2).unsqueeze(3), *reversed(t.pre)]
    previous, total = None, torch.zeros((), device=s.stem.device)
    for fusion, f_s, f_t in zip(m.fusions, ours, theirs, strict=True):
        fused, previous = fusion(f_s, previous, f_t.shape[2:])
        loss, weight, weights = ((fused - f_t) ** 2).mean(), 1.0, 1.0
        for level in (4, 2, 1):
            if level < fused.shape[2]:
                weight /= 2
                difference = F.adaptive_avg_pool2d(fused, level) - F.adaptive_avg_pool2d(f_t, level)
                loss, weights = loss + weight * (difference**2).mean(), weights + weight
        total = total + loss / weights
    return min(batch.epoch / m.hp.warm_up, 1.0) * total


MAPS: dict[str, Literal] = {f.__name__: f for f in (fitnet, at, sp, vid, ab, ft, fsp, nst, kdsvd, semckd, simkd, ofd, reviewkd)}
LITERAL = LOGITS_AND_EMBEDDINGS | MAPS
