"""What several losses are made of."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def kl(logits_s: Tensor, logits_t: Tensor, T: float | Tensor) -> Tensor:
    """Softened KL: T^2 KL(softmax(z_t / T) || softmax(z_s / T)), mean over the batch; (B, K), (B, K) -> scalar."""
    log_p, log_q = F.log_softmax(logits_t.float() / T, 1), F.log_softmax(logits_s.float() / T, 1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * T**2


def label_and_others(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K) logits, already divided by T -> (B,) log-odds of the label's class and (B, K) log-probabilities of the others.

    The others' are among themselves, ln softmax without the label's class; 0 at the label's, so that it drops out of sums.
    """
    z = z.float()
    label = torch.arange(z.shape[1], device=z.device) == labels[:, None]
    others = z.masked_fill(label, -math.inf).logsumexp(1, keepdim=True)
    return (z.gather(1, labels[:, None]) - others)[:, 0], (z - others).masked_fill(label, 0.0)


def standardised(z: Tensor) -> Tensor:
    """(B, K) -> (B, K): mean 0 and standard deviation 1 over the classes."""
    z = z.float()
    return (z - z.mean(1, keepdim=True)) / (z.var(1, keepdim=True).clamp(min=1e-12).sqrt() + 1e-7)


def same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pools the larger of two maps to the size of the smaller; (B, C, H, W) each."""
    if a.shape[2] > b.shape[2]:
        return F.adaptive_avg_pool2d(a, (b.shape[2], b.shape[3])), b
    if a.shape[2] < b.shape[2]:
        return a, F.adaptive_avg_pool2d(b, (a.shape[2], a.shape[3]))
    return a, b


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, under autocast too: for Gram matrices."""
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float()
