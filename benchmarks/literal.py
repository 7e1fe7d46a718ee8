"""Every method's loss as its formula reads, written the straightforward way: what `src/pupil/methods` is measured against.

A function takes the method (for its settings and its trained layers), the features of student and teacher and the batch.
It gives the method's own terms, weighted among themselves, without cross-entropy and without `beta` where the method has
one term; the same as `losses.ours`.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pupil.types import Batch, Features

Literal = Callable[[Any, Features, Features, Batch], Tensor]


# --- logits ---------------------------------------------------------------------------------------------------------------


def softened_kl(z_s: Tensor, z_t: Tensor, T: Any) -> Tensor:
    return F.kl_div(F.log_softmax(z_s / T, 1), F.softmax(z_t / T, 1), reduction="sum") * T**2 / len(z_s)


def kd(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    return m.hp.kl * softened_kl(s.logits, t.logits, m.hp.T)


def kdmse(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    return ((F.softmax(s.logits, 1) - F.softmax(t.logits, 1)) ** 2).mean()


def thkd(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    return softened_kl(F.linear(s.embedding, m.teacher_head.weight, m.teacher_head.bias), t.logits, m.hp.T_head)


def dkd(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    T, mask = m.hp.T, F.one_hot(batch.labels, s.logits.shape[1]).float()
    p_s, p_t = F.softmax(s.logits / T, 1), F.softmax(t.logits / T, 1)
    two_s, two_t = (torch.stack([(p * mask).sum(1), (p * (1 - mask)).sum(1)], 1) for p in (p_s, p_t))
    tckd = F.kl_div(two_s.log(), two_t, reduction="sum") * T**2 / len(mask)
    others_s, others_t = F.log_softmax(s.logits / T - 1000 * mask, 1), F.softmax(t.logits / T - 1000 * mask, 1)
    nckd = F.kl_div(others_s, others_t, reduction="sum") * T**2 / len(mask)
    return min(batch.epoch / m.hp.warmup, 1.0) * (m.hp.alpha * tckd + m.hp.beta * nckd)


def nkd(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    T, y = m.hp.T, batch.labels[:, None]
    others = torch.ones_like(s.logits, dtype=torch.bool).scatter(1, y, False)
    q_s, q_t = (F.softmax(z[others].view(len(z), -1) / T, 1) for z in (s.logits, t.logits))
    label = -(F.softmax(t.logits, 1).gather(1, y) * F.softmax(s.logits, 1).gather(1, y).log()).mean()
    rest = -(q_t * q_s.log()).sum(1).mean() * T**2
    return m.hp.beta * (label + m.hp.gamma * rest)


def dist(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    T = m.hp.T

    def one_minus_pearson(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(1).unsqueeze(1), b - b.mean(1).unsqueeze(1)
        return 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()

    p_s, p_t = F.softmax(s.logits / T, 1), F.softmax(t.logits / T, 1)
    inter, intra = one_minus_pearson(p_s, p_t), one_minus_pearson(p_s.t(), p_t.t())
    return m.hp.beta * T**2 * (m.hp.inter * inter + m.hp.intra * intra)


def wttm(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    p, u = F.softmax(t.logits / m.hp.T, 1), (F.softmax(t.logits, 1) ** (1 / m.hp.T)).sum(1)
    divergence = F.kl_div(F.log_softmax(s.logits, 1), p, reduction="none").sum(1)
    return ((u if m.hp.weighted else 1) * divergence).mean()


def ls(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    z_s, z_t = ((z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7) for z in (s.logits, t.logits))
    return m.hp.beta * m.inner.hp.kl * softened_kl(z_s, z_t, m.hp.T)


class Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.factor * grads[0], None


def ctkd(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    factor = 0.5 * (1 + math.cos(math.pi * min(batch.epoch, 10) / 10)) * (0 - (-1)) - 1
    tau = 1 + 20 * torch.sigmoid(Scaled.apply(m.g, factor))
    return m.inner.hp.kl * softened_kl(s.logits, t.logits, tau)


def mlkd(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    (s_w, s_s), (t_w, t_s), T0 = s.logits.chunk(2), t.logits.chunk(2), m.hp.T
    temperatures, sure = (T0, 3.0, 5.0, 2.0, 6.0), F.softmax(t_w, 1)
    surest, per_class = sure.max(1)[0].detach().cpu().numpy(), sure.sum(0).detach().cpu().numpy()
    share_b = (surest <= np.percentile(surest, 50)).mean().item()
    share_c = (per_class <= np.percentile(per_class, 50)).mean().item()
    total = torch.zeros((), device=s_w.device)
    for T in temperatures:
        p_s, p_t = F.softmax(s_w / T, 1), F.softmax(t_w / T, 1)
        (B, K), kl_weak = p_s.shape, softened_kl(s_w, t_w, T)
        total = total + share_b * kl_weak
        total = total + (kl_weak if T in (2.0, 6.0) else softened_kl(s_s, t_s, T))
        total = total + share_c * ((torch.mm(p_t.t(), p_t) - torch.mm(p_s.t(), p_s)) ** 2).sum() / K
        total = total + share_b * ((torch.mm(p_t, p_t.t()) - torch.mm(p_s, p_s.t())) ** 2).sum() / B
    return m.hp.beta * total


def uskd(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    hp, z, y = m.hp, s.logits, batch.labels[:, None]
    B, K = z.shape
    weak_z = m.weak_head(F.adaptive_avg_pool2d(s.maps[-2], 1).flatten(1))
    p, w = F.softmax(z, 1), F.softmax(weak_z, 1).detach()
    p_y, w_y, fixed = p.gather(1, y), w.gather(1, y), p.detach()
    target = (p_y**2 + 1 - (p_y**2).mean()).detach()
    order = torch.sort(w / (1 - w_y + 1e-6) + fixed / (1 - fixed.gather(1, y) + 1e-6), 1, descending=True)[1]
    rank = torch.zeros_like(z).scatter(1, order, torch.arange(1.0, K + 1, device=z.device).expand(B, K))
    others = torch.ones_like(z, dtype=torch.bool).scatter(1, y, False)
    zipf = (1 / rank)[others].view(B, K - 1)
    zipf = zipf / zipf.sum(1, keepdim=True)
    smooth = F.one_hot(batch.labels, K).float() * 0.9 + 0.1 / K
    label, rest = -(target * p_y.log()).mean(), -(zipf * F.log_softmax(z[others].view(B, K - 1), 1)).sum(1).mean()
    return hp.alpha * label + hp.beta * rest + hp.mu * -(smooth * F.log_softmax(weak_z, 1)).sum(1).mean()


# --- embeddings -----------------------------------------------------------------------------------------------------------


def cc(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    d = torch.abs(m.embed_s(s.embedding) - m.embed_t(t.embedding))
    return torch.sum(d[:-1] * d[1:], 1).mean()


def rkd(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    """All triples at once: B x B x B x d numbers."""

    def distances(e: Tensor) -> Tensor:
        square = e.pow(2).sum(1)
        d = (square.unsqueeze(1) + square.unsqueeze(0) - 2 * e @ e.t()).clamp(min=1e-12).sqrt().clone()
        d[range(len(e)), range(len(e))] = 0
        return d / d[d > 0].mean()

    def angles(e: Tensor) -> Tensor:
        v = F.normalize(e.unsqueeze(0) - e.unsqueeze(1), dim=2)
        return (v.unsqueeze(2) * v.unsqueeze(1)).sum(3)

    e_s, e_t = s.embedding, t.embedding
    distance = F.smooth_l1_loss(distances(e_s), distances(e_t))
    return m.hp.distance * distance + m.hp.angle * F.smooth_l1_loss(angles(e_s), angles(e_t))


def pkt(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    def probabilities(e: Tensor) -> Tensor:
        e = e / (torch.sqrt(torch.sum(e**2, 1, keepdim=True)) + 1e-7)
        similar = (torch.mm(e, e.t()) + 1) / 2
        return similar / similar.sum(1, keepdim=True)

    p_s, p_t = probabilities(s.embedding), probabilities(t.embedding)
    return torch.mean(p_t * torch.log((p_t + 1e-7) / (p_s + 1e-7)))


def srrl(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    r = m.connect(s.embedding.unsqueeze(2).unsqueeze(3)).flatten(1)
    head = m.teacher_head
    return ((r - t.embedding) ** 2).mean() + ((F.linear(r, head.weight, head.bias) - t.logits) ** 2).mean()


def crd_rows(m: Any, batch: Batch) -> Tensor:
    """The image itself and negatives without replacement, drawn image by image on the host, as a data set does it."""
    n, rows = len(m.bank_s), []
    classes = np.empty(n, dtype=np.int64)
    classes[m.by_class.cpu().numpy()] = np.repeat(np.arange(len(m.starts) - 1), np.diff(m.starts.cpu().numpy()))
    negatives = {c: np.flatnonzero(classes != c) for c in set(batch.labels.tolist())}
    for i, label in zip(batch.ids.tolist(), batch.labels.tolist(), strict=True):
        drawn = np.random.choice(negatives[label], m.hp.k, replace=m.hp.k > len(negatives[label]))
        rows.append(np.hstack([[i], drawn]))
    return torch.from_numpy(np.stack(rows)).to(m.bank_s.device)


def crd_of(m: Any, s: Features, t: Features, batch: Batch, rows: Tensor) -> Tensor:
    """Both banks' rows of every image are fetched: B x (K + 1) x dim numbers, twice, kept for the way back."""
    (B, R), (n, dim), total = rows.shape, m.bank_s.shape, torch.zeros((), device=rows.device)
    v_s, v_t = m.embed_s(s.embedding), m.embed_t(t.embedding)
    v_s, v_t = (v / v.pow(2).sum(1, keepdim=True).pow(0.5) for v in (v_s, v_t))
    for side, (v, bank) in enumerate(((v_s, m.bank_t), (v_t, m.bank_s))):
        fetched = torch.index_select(bank, 0, rows.view(-1)).view(B, R, dim)
        scores = torch.exp(torch.bmm(fetched, v.view(B, dim, 1)) / m.hp.tau).squeeze(2)
        if m.Z[side] == 0:
            m.Z[side] = scores.detach().mean() * n
        p, c = scores / m.Z[side].clone(), (R - 1) / n
        positive, negative = torch.log(p[:, 0] / (p[:, 0] + c + 1e-7)), torch.log(c / (p[:, 1:] + c + 1e-7))
        total = total - (positive.sum() + negative.sum()) / B
    with torch.no_grad():
        for bank, v in ((m.bank_s, v_s), (m.bank_t, v_t)):
            new = bank.index_select(0, batch.ids) * m.hp.momentum + v * (1 - m.hp.momentum)
            bank.index_copy_(0, batch.ids, new / new.pow(2).sum(1, keepdim=True).pow(0.5))
    return total


def crd(m: Any, s: Features, t: Features, batch: Batch) -> Tensor:
    return crd_of(m, s, t, batch, crd_rows(m, batch))


LOGITS_AND_EMBEDDINGS: dict[str, Literal] = {
    f.__name__: f for f in (kd, kdmse, thkd, dkd, nkd, dist, wttm, ls, ctkd, mlkd, uskd, cc, rkd, pkt, srrl, crd)
}
