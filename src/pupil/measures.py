"""What is measured of a trained network: functions of logits and labels, of weights, of time.  No configuration."""

import math
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def quality(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """(N, K), (N,) -> top1 and top5 in percent, nll in nats, ece in percent."""
    ranks = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
    return {
        "top1": 100 * ranks[:, 0].double().mean().item(),
        "top5": 100 * ranks.any(1).double().mean().item(),
        "nll": F.cross_entropy(logits.double(), labels).item(),
        "ece": 100 * calibration_error(logits, labels),
    }


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error in 0..1, equal-width bins of confidence: Guo et al., ICML 2017, eq. (3)."""
    confidence, guess = logits.double().softmax(1).max(1)
    bin_of = (confidence * bins).ceil().clamp(1, bins).long() - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, (guess == labels).double() - confidence)
    return (gap.abs().sum() / len(labels)).item()


def per_class(logits: Tensor, labels: Tensor) -> list[float]:
    """Accuracy of each class in percent; NaN for a class without samples."""
    table = confusion(logits, labels).double()
    return (100 * table.diagonal() / table.sum(1)).tolist()


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """(K, K) counts: row the true class, column the predicted one."""
    k = logits.shape[1]
    return torch.bincount(labels * k + logits.argmax(1), minlength=k * k).view(k, k)


def agreement(a: Tensor, b: Tensor) -> float:
    """Share of samples on which two networks answer the same class, in percent; (N, K) each, same order."""
    return 100 * (a.argmax(1) == b.argmax(1)).double().mean().item()


def parameters(net: nn.Module) -> int:
    """Weights of the deployed network: parameters, and the frozen classifier where there is one."""
    running = ("running_mean", "running_var", "num_batches_tracked")
    return sum(t.numel() for name, t in net.state_dict().items() if not name.endswith(running))


def macs(net: nn.Module, image_size: int) -> int:
    """Multiply-accumulates of one image, as torch counts them: convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, image_size, image_size))
    return counter.get_total_flops() // 2


def latency(net: nn.Module, image_size: int, batch: int, runs: int = 30, warm_up: int = 5) -> dict[str, float]:
    """Milliseconds of one forward pass on this CPU: median and 95th percentile."""
    x = torch.zeros(batch, 3, image_size, image_size)
    times = []
    with torch.inference_mode():
        for i in range(warm_up + runs):
            start = time.perf_counter()
            net(x)
            if i >= warm_up:
                times.append(1000 * (time.perf_counter() - start))
    times.sort()
    return {"median_ms": statistics.median(times), "p95_ms": times[math.ceil(0.95 * runs) - 1]}


class Verdict(NamedTuple):
    """How a method compares with its matched baseline."""

    word: str  # BEATS, TIES or LOSES; "one seed" where no test is possible
    difference: float  # mean over seeds of method minus baseline
    p: float  # two-sided; NaN where no test is possible


def verdict(method: Sequence[float], baseline: Sequence[float], level: float = 0.05) -> Verdict:
    """Paired two-sided t-test over seeds (a seed gives both the same initial student and the same batches)."""
    from scipy.stats import ttest_rel

    differences = [m - b for m, b in zip(method, baseline, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return Verdict("one seed", mean, math.nan)
    if max(differences) == min(differences):  # no spread: the t-test is undefined
        return Verdict("TIES" if mean == 0 else "BEATS" if mean > 0 else "LOSES", mean, 1.0 if mean == 0 else 0.0)
    p = float(ttest_rel(method, baseline).pvalue)  # pyright: ignore[reportAttributeAccessIssue]
    word = "TIES" if p >= level else "BEATS" if mean > 0 else "LOSES"
    return Verdict(word, mean, p)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, sample standard deviation (0 for one value) and number."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0, "n": len(values)}
