"""Time and peak memory of every loss, forward and backward, against its literal formula; prints a Markdown table.

python benchmarks/losses.py [--methods rkd,nst] [--batch 64,256] [--device cpu|cuda]

Both sides run in turns in one process, on the same features of resnet8x4 and resnet32x4 for random images; before that their
losses and gradients are compared.  A ratio is literal / ours, so above 1 ours is cheaper.  Times are medians over rounds and
their ratio the median of the rounds' ratios.  Peak: what a step allocates at most over what is there before it, from torch's
allocator (CUDA) or from the allocations that torch's profiler records (CPU).
"""

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"KINETO_LOG_LEVEL": "6", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # quiet profiler; read when torch is loaded

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cases import NAMES, Case, Size, case, disagreement, step

SMALL = (16, 32)  # batches from which that is foretold
ROUNDS = (3, 300)  # at least, at most
MIB = 2**20
Step = Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(n for n in NAMES if "," not in n), help="names, with commas between")
    parser.add_argument("--batch", default="64,256", help="batch sizes, with commas between")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing, per method and batch size")
    parser.add_argument("--limit", type=float, default=8.0, help="GiB; a literal formula that needs more is not run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    asked = args.methods.split(",")
    if unknown := set(asked) - set(NAMES):
        parser.error(f"no such method: {', '.join(sorted(unknown))}; known: {', '.join(n for n in NAMES if ',' not in n)}")
    print("| method | B | ms ours / literal | ratio | peak MiB ours / literal | ratio |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in [n for n in NAMES if n.split(",")[0] in asked]:
        for batch in map(int, args.batch.split(",")):
            print(row(name, batch, args.device, args.seconds, args.limit), flush=True)
            gc.collect()


def row(name: str, batch: int, device: str, seconds: float, limit: float) -> str:
    this = case(name, Size(batch), device)
    steps = [partial(step, loss, this.wrt) for loss in (this.ours, this.literal)]
    foretold = foretell(name, batch, device)
    if foretold > limit * 1024:
        (ms,), most = times(steps[:1], device, seconds), peak(steps[0], this, device)
        memory = f"{shown(most)} / {shown(foretold)} foretold | {foretold / most:.1f}"
        return f"| {name} | {batch} | {shown(ms)} / not run | | {memory} |"
    compare(name, this)
    ms, ms_l = times(steps, device, seconds)
    most, most_l = (peak(run, this, device) for run in steps)
    ratio = statistics.median(b / a for a, b in zip(ms, ms_l, strict=True))
    memory = f"{shown(most)} / {shown(most_l)} | {most_l / most:.2f}"
    return f"| {name} | {batch} | {shown(ms)} / {shown(ms_l)} | {ratio:.2f} | {memory} |"


def compare(name: str, this: Case) -> None:
    """Says on stderr if the two sides differ; CRD's drawings differ by chance, and are compared with the rows given."""
    if name == "crd":
        return
    loss, gradient = disagreement(this)
    if loss > 1e-4 or gradient > 1e-3:
        say = f"{name}: ours and the literal formula differ: the loss by {loss:.1e}, a gradient by {gradient:.1e}"
        print(say, file=sys.stderr, flush=True)


def times(steps: list[Step], device: str, seconds: float) -> list[list[float]]:
    """Milliseconds of each, round by round, taken in turns."""
    found: list[list[float]] = [[] for _ in steps]
    for run in steps:
        run()
    start = time.perf_counter()
    while len(found[0]) < ROUNDS[0] or (len(found[0]) < ROUNDS[1] and time.perf_counter() - start < seconds):
        for run, taken in zip(steps, found, strict=True):
            wait(device)
            begin = time.perf_counter()
            run()
            wait(device)
            taken.append(1e3 * (time.perf_counter() - begin))
    return found


def peak(run: Step, this: Case, device: str) -> float:
    """MiB, the gradients among them."""
    for x in this.wrt:
        x.grad = None
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        wait(device)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    profiler: Any = seen.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / MIB


def foretell(name: str, batch: int, device: str) -> float:
    """MiB that the literal formula would take: a power of the batch size, through two small batches."""
    if batch <= max(SMALL):
        return 0.0
    found = []
    for small in SMALL:
        this = case(name, Size(small), device)
        found.append(peak(partial(step, this.literal, this.wrt), this, device))
    growth = found[1] / found[0]
    return found[1] * growth ** torch.tensor(batch / SMALL[1]).log2().item()


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def shown(value: float | list[float]) -> str:
    value = statistics.median(value) if isinstance(value, list) else value
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
