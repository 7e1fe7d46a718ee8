"""How much a step computes, and how much the device could: floating-point operations per second against a measured peak."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

SIDE = {"cpu": 1536, "cuda": 8192}  # of the square matrices whose product is the peak
ROUNDS = 20


def count(call: Callable[[], Any]) -> int:
    """Of convolutions and matrix products, forward and backward, as torch counts them; a multiply-add is two."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def peak(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of the best of a few matrix products: what this device was seen to do, whatever its data sheet says."""
    n = SIDE[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(ROUNDS):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def told(flops: int, seconds: float, best: float, dtype: torch.dtype) -> str:
    """`flops` of a step of `seconds`, against `best` of `peak`."""
    kind, rate = str(dtype).removeprefix("torch."), flops / seconds
    done = f"{flops / 1e9:,.1f} GFLOP a step, {rate / 1e9:,.0f} GFLOP/s"
    return f"{done}, {100 * rate / best:.0f} % of the {best / 1e9:,.0f} of a {kind} matrix product"
