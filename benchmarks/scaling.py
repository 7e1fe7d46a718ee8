"""Training steps by several processes against one; prints a Markdown table, writes JSON.

python -m benchmarks.scaling [--processes 1,2] [--pair small] [--method kd] [--batch 64] [--device cuda] [--json scaling.json]

Every process has a GPU of its own, or so many threads (--threads) of the CPU.  `same batch`: the batch stays as large as in one
process, and is shared; `larger batch`: it grows with the processes.  All groups of processes are there from the beginning and
take turns of a few steps, whoever waits does nothing; a ratio is images/s against one process, the median of the rounds' ratios
with their quartiles, and efficiency that over the number of processes.  Processor time is that of all processes for an image,
over that of one process alone, which other work on the machine hardly moves: 1 is perfect sharing.  Share of the peak: FLOP/s
of convolutions and matrix products against those of one large matrix product, of all processes together.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.multiprocessing import get_context

from benchmarks.step import CLASSES, MEAN, PAIRS, STD, Ours, machine, made
from pupil import flops
from pupil.data.resident import Augment, Resident
from pupil.divided import divided
from pupil.parts import Parts
from pupil.speed import Speed, choose, quick

WARM = 2  # steps


class Group(NamedTuple):
    processes: int
    batch: int  # of all processes together
    label: str


class Setting(NamedTuple):
    """What is equal for all groups."""

    networks: tuple[str, str]
    method: str
    device: str
    threads: int
    steps: int  # of a turn
    speed: Speed
    folder: Path


def main(args: list[str] | None = None) -> None:
    given = parser().parse_args(args)
    counts = [int(n) for n in given.processes.split(",")]
    if given.device == "cuda" and max(counts) > torch.cuda.device_count():
        raise SystemExit(f"{max(counts)} processes need a GPU each, and there are {torch.cuda.device_count()}")
    device = torch.device(given.device)
    speed = choose(given.precision, given.layout, False, device)
    groups = [Group(n, given.batch, "same batch") for n in dict.fromkeys([1, *counts])]
    groups += [Group(n, n * given.batch, "larger batch") for n in counts if n > 1]
    about = f"{machine(device)}, {given.threads} threads each; {given.pair}, {given.method}; {speed}"
    print(f"{about}\n")
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(PAIRS[given.pair], given.method, given.device, given.threads, given.steps, speed, Path(scratch))
        found = measure(groups, setting, given.rounds)
    rows = [row(number, groups, found) for number in range(len(groups))]
    print("| processes | batch | images/s | ratio | quartiles | efficiency | processor time | share of the peak |")
    print("|---|---|---|---|---|---|---|---|")
    for r in rows:
        spread = f"{r['ratio']:.2f} | {r['quartiles'][0]:.2f} to {r['quartiles'][1]:.2f} | {100 * r['efficiency']:.0f} %"
        share = f"{r['processor_time']:.2f} | {100 * r['share_of_peak']:.0f} %"
        print(f"| {r['processes']} | {r['batch']} ({r['label']}) | {r['images_per_second']:,.0f} | {spread} | {share} |")
    if given.json:
        facts = {"machine": machine(device), "about": about, "load": os.getloadavg(), "peak": found.peak, "rows": rows}
        given.json.write_text(json.dumps(facts | {k: v for k, v in vars(given).items() if k != "json"}, indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpus = torch.cuda.device_count()
    most = gpus or os.cpu_count() or 1
    p.add_argument("--processes", default=",".join(str(n) for n in (1, 2, 4, 8) if n <= most))
    p.add_argument("--pair", default="small", choices=tuple(PAIRS))
    p.add_argument("--method", default="kd")
    p.add_argument("--batch", type=int, default=64, help="of one process")
    p.add_argument("--threads", type=int, default=1, help="of each process, on the CPU")
    p.add_argument("--steps", type=int, default=4, help="of a turn")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--device", default="cuda" if gpus else "cpu", choices=("cpu", "cuda"))
    p.add_argument("--precision", default="float32", choices=("float32", "bf16", "auto"))
    p.add_argument("--layout", default="contiguous", choices=("contiguous", "channels_last", "auto"))
    p.add_argument("--json", type=Path)
    return p


class Found(NamedTuple):
    rates: list[list[float]]  # images/s of each group, round by round
    work: list[list[float]]  # seconds of processor time for an image, likewise
    flops: float  # of an image
    peak: float  # FLOP/s of one process


class Turn(NamedTuple):
    """What one process says of a turn."""

    seconds: float
    work: float  # seconds of processor time
    flops: int  # of a step; alone
    peak: float  # FLOP/s; alone


def measure(groups: list[Group], setting: Setting, rounds: int) -> Found:
    context = get_context("spawn")
    orders = [[context.SimpleQueue() for _ in range(group.processes)] for group in groups]
    found, started = context.SimpleQueue(), []
    for number, group in enumerate(groups):
        for rank, order in enumerate(orders[number]):
            process = context.Process(target=member, args=(rank, number, group, setting, order, found), daemon=True)
            process.start()
            started.append(process)
        for _ in range(group.processes):
            found.get()  # ready
    rates: list[list[float]] = [[] for _ in groups]
    work: list[list[float]] = [[] for _ in groups]
    best, computed = 0.0, 0
    for _ in range(rounds):
        for number, group in enumerate(groups):
            for order in orders[number]:
                order.put(True)
            turns: list[Turn] = [found.get() for _ in range(group.processes)]
            images = group.batch * setting.steps
            rates[number].append(images / max(turn.seconds for turn in turns))
            work[number].append(sum(turn.work for turn in turns) / images)
            if number == 0:
                best, computed = max(best, turns[0].peak), turns[0].flops
    for order in (order for several in orders for order in several):
        order.put(False)
    for process in started:
        process.join()
    return Found(rates, work, computed / groups[0].batch, best)


def member(
    rank: int, number: int, group: Group, setting: Setting, orders: "SimpleQueue[bool]", found: "SimpleQueue[Any]"
) -> None:
    """One process: a turn for each order, until told to stop."""
    torch.set_num_threads(setting.threads)
    device = torch.device("cuda", rank) if setting.device == "cuda" else torch.device("cpu")
    g = torch.Generator().manual_seed(0)
    n = group.batch * setting.steps
    pixels = torch.randint(0, 256, (n, 3, 32, 32), generator=g, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (n,), generator=g)
    method = made(setting.method, setting.networks, labels, device)
    side = Ours(method, Resident(pixels, labels, MEAN, STD, group.batch, device, 0, Augment(4, True)))
    plain = Parts(False, device)
    first = number == 0  # alone
    computed = flops.count(lambda: side.step(next(side.batches()), plain)) if first else 0
    dtype = torch.bfloat16 if setting.speed.bf16 else torch.float32
    if group.processes > 1:
        meet = f"file://{setting.folder}/meet-{number}"
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", meet, rank=rank, world_size=group.processes)
    with divided(method, method.teacher), quick(method, method.teacher, setting.speed):
        for batch, _ in zip(side.batches(), range(WARM), strict=False):
            side.step(batch, plain)
        found.put(None)
        while orders.get():
            peak = flops.peak(device, dtype) if first else 0.0
            batches = list(side.batches())  # loading is not what is measured
            if group.processes > 1:
                dist.barrier()
            flops.synchronize(device)
            begin, busy = time.perf_counter(), time.process_time()
            for batch in batches:
                side.step(batch, plain)
            flops.synchronize(device)
            found.put(Turn(time.perf_counter() - begin, time.process_time() - busy, computed, peak))
    if group.processes > 1:
        dist.destroy_process_group()


def row(number: int, groups: list[Group], found: Found) -> dict[str, Any]:
    group, rates, work = groups[number], found.rates[number], found.work[number]
    low, ratio, high = statistics.quantiles([a / b for a, b in zip(rates, found.rates[0], strict=True)], n=4)
    rate = statistics.median(rates)
    facts = {**group._asdict(), "images_per_second": rate, "ratio": ratio, "quartiles": (low, high)}
    facts["processor_time"] = statistics.median(a / b for a, b in zip(work, found.work[0], strict=True))
    share = found.flops * rate / (group.processes * found.peak)
    return facts | {"efficiency": ratio / group.processes, "share_of_peak": share}


if __name__ == "__main__":
    main()
