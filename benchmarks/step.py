"""Time of a training step against the loop that published code has in common; prints a Markdown table, writes JSON.

python -m benchmarks.step [--pairs large,small] [--methods kd,simkd] [--threads 2] [--profile] [--json step.json]
python -m benchmarks.step --methods kd --views 4       # and with the cache of the teacher's answers (the setting views)

Both sides train the same method on the same made images in one process, by turns of a few steps; a turn includes the loading
of all its batches but the first, and the other side's workers have nothing left to do meanwhile.  A ratio is common loop /
ours, so above 1 ours is faster; it is the median of the turns' ratios, with their quartiles.  The same of the processor time of
this process, which other work on the machine hardly moves; the common loop's workers are not in it.  Below the table: how much
ours computes, in FLOP/s, against a measured peak.
"""

import argparse
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.common_loop import CommonLoop, Images
from pupil import flops
from pupil.cache import Cache, Kept, Size
from pupil.data.resident import Augment, Resident
from pupil.fit import Teach, activate, teacher_features
from pupil.kept import refuse_readers
from pupil.methods import METHODS
from pupil.methods.base import Method, Setup
from pupil.models import build
from pupil.net import probe
from pupil.optim import Optim, make_optimizer
from pupil.parts import PARTS, Parts
from pupil.speed import choose, quick
from pupil.types import Batch, UserError

PAIRS = {"large": ("resnet32x4", "resnet8x4"), "small": ("resnet56", "resnet20")}
TURN = {"large": 3, "small": 8}  # timed steps
CLASSES, MEAN, STD = 100, (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default="large,small", help="large, small, with commas between")
    parser.add_argument("--methods", default="kd,simkd")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--workers", type=int, default=2, help="of the common loop's DataLoader")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="auto", choices=("float32", "bf16", "auto"))
    parser.add_argument("--layout", default="auto", choices=("contiguous", "channels_last", "auto"))
    parser.add_argument("--compile", default="auto", choices=("false", "true", "auto"))
    parser.add_argument("--views", type=int, help="measures ours with so many views in the cache of the teacher's answers too")
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes, on both sides")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, rows = torch.device(args.device), []
    speed = choose(args.precision, args.layout, "auto" if args.compile == "auto" else args.compile == "true", device)
    print(f"{machine(device)}, {args.threads} threads; ours: {speed}\n")
    print("| pair | method | ms per step, common loop / ours | ratio | quartiles | ratio of processor time | quartiles |")
    print("|---|---|---|---|---|---|---|", flush=True)
    lines, dtype = [], torch.bfloat16 if speed.bf16 else torch.float32
    best = flops.peak(device, dtype)
    for pair in args.pairs.split(","):
        for name in args.methods.split(","):
            try:
                found = measure(pair, name, args, speed, device)
            except UserError as e:
                parser.error(str(e))
            common, *ours = found["seconds"]
            for side, title in zip(ours, (name, f"{name}, {args.views} views kept"), strict=False):
                ms, wall, wall_range = compared([[t[0] for t in turns] for turns in (common, side)])
                ms_cpu, cpu, cpu_range = compared([[t[1] for t in turns] for turns in (common, side)])
                ratios = (wall, wall_range), (cpu, cpu_range)
                shown = [f"{ratio:.2f} | {low:.2f} to {high:.2f}" for ratio, (low, high) in ratios]
                print(f"| {pair} | {title} | {ms[0]:.0f} / {ms[1]:.0f} | {' | '.join(shown)} |", flush=True)
                row = {"pair": PAIRS[pair], "method": title, "ms": ms, "ratio": wall, "quartiles": wall_range}
                rows.append(row | {"processor_ms": ms_cpu, "processor_ratio": cpu, "processor_quartiles": cpu_range})
                if side is ours[0]:
                    seconds = ms[1] / 1e3
                    rows[-1] |= {"flops": found["flops"], "flops_per_second": found["flops"] / seconds, "peak": best}
                    lines.append(f"{pair}, {name}, ours: {flops.told(found['flops'], seconds, best, dtype)}")
            if args.views:
                rows[-1] |= worth(found["filling"], ours[0], ours[1], args.views)
                lines.append(f"{pair}, {name}: {told(rows[-1], args.views)}")
            lines += found["profiles"]
    print("", *lines, sep="\n")
    if args.json:
        facts = {"machine": machine(device), "speed": str(speed), "load": os.getloadavg(), "rows": rows}
        args.json.write_text(json.dumps(facts | {k: v for k, v in vars(args).items() if k != "json"}, indent=1) + "\n")


def compared(seconds: list[list[float]]) -> tuple[list[float], float, tuple[float, float]]:
    """Milliseconds of both sides, the ratio and its quartiles."""
    ratios = [a / b for a, b in zip(*seconds, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return [1e3 * statistics.median(side) for side in seconds], ratio, (low, high)


def worth(filling: list[tuple[float, float]], ours: list[Any], kept: list[Any], views: int) -> dict[str, float]:
    """What it takes to fill one view and what an epoch from the cache saves, per batch; medians of processor time."""
    fill, plain, quick = (1e3 * statistics.median(t[1] for t in turns) for turns in (filling, ours, kept))
    return {"fill_ms": fill, "saved_ms": plain - quick, "pays_after_epochs": views * fill / (plain - quick)}


def told(row: dict[str, Any], views: int) -> str:
    return (
        f"filling a view takes {row['fill_ms']:.0f} ms of processor time per batch, an epoch from the cache saves"
        f" {row['saved_ms']:.0f}: {views} views pay after {row['pays_after_epochs']:.1f} epochs, counted over all students"
    )


def measure(pair: str, name: str, args: argparse.Namespace, speed: Any, device: torch.device) -> dict[str, Any]:
    """Seconds per step of all sides, turn by turn, those of filling a view, and the lines of the profiles."""
    g = torch.Generator().manual_seed(0)
    n = args.batch * (TURN[pair] + 1)
    pixels = torch.randint(0, 256, (n, 3, 32, 32), generator=g, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (n,), generator=g)
    literal, ours, third = (made(name, PAIRS[pair], labels, device) for _ in range(3))
    common = CommonLoop(name, literal, Images(pixels, labels, MEAN, STD), args.batch, args.workers, device)
    about = pixels, labels, MEAN, STD, args.batch, device, 0, Augment(4, True)
    filling: list[tuple[float, float]] = []
    plain = Ours(made(name, PAIRS[pair], labels, device), Resident(*about))
    computed = flops.count(lambda: plain.step(next(plain.batches()), Parts(False, device)))
    with ExitStack() as stack:
        stack.enter_context(quick(ours, ours.teacher, speed))
        sides = [common, Ours(ours, Resident(*about))]
        if args.views:
            refuse_readers(name, third, args.views, 32)
            few = Resident(*about, views=args.views)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            stack.enter_context(quick(third, third.teacher, speed))
            kept = keep(third, few, folder, args.views, filling)
            sides.append(Ours(third, few, kept))
        for side in sides:
            turn(side, Parts(False, device))
        seconds = [[] for _ in sides]
        for _ in range(args.rounds):
            for side, found in zip(sides, seconds, strict=True):
                found.append(turn(side, Parts(False, device)))
        profiles = [line for side in sides if args.profile for line in profile(side, f"{pair}, {name}", device)]
    return {"seconds": seconds, "profiles": profiles, "filling": filling, "flops": computed}


def keep(method: Method, train: Resident, folder: Path, views: int, filling: list[tuple[float, float]]) -> Kept:
    """The cache, and the seconds per batch that each view took."""
    like = method.setup.t
    cache = Cache(folder, {}, Size(train.samples, like.logits.shape[1], like.embedding.shape[1]))
    method.teacher.features(next(train.epoch(1)).images)  # compiled now, if at all
    for view in range(1, views + 1):
        begin, work = time.perf_counter(), time.process_time()
        with redirect_stdout(io.StringIO()):
            cache.fill(view, train, method.teacher.features)
        filling.append(((time.perf_counter() - begin) / len(train), (time.process_time() - work) / len(train)))
    return Kept(cache, views, like, train.device)


def made(name: str, pair: tuple[str, str], labels: torch.Tensor, device: torch.device) -> Method:
    torch.manual_seed(0)
    teacher, student = (build(network, CLASSES) for network in pair)
    teacher.requires_grad_(False).eval()
    method = METHODS[name](Setup(student, teacher, probe(student, 32), probe(teacher, 32), labels), METHODS[name].Config())
    teacher.to(device)
    method.to(device)
    activate(method, method.phases()[0])
    return method


class Ours:
    """The loop of `pupil.fit`."""

    def __init__(self, method: Method, train: Resident, teach: Teach | None = None) -> None:
        self.method, self.train, self.epoch = method, train, 0
        self.teach = teach or partial(teacher_features, method.teacher)
        self.phase = method.phases()[0]
        self.optimizer, _ = make_optimizer(self.phase, Optim())

    def batches(self) -> Iterator[Batch]:
        self.epoch += 1
        return self.train.epoch(self.epoch)

    def step(self, batch: Batch, parts: Parts) -> None:
        parts.step(self.method, self.teach, batch, self.phase, self.optimizer)


class Side(Protocol):
    def batches(self) -> Iterator[Any]: ...
    def step(self, batch: Any, parts: Parts) -> None: ...


def turn(side: Side, parts: Parts) -> tuple[float, float]:
    """Seconds per step, over all batches of the made images but the first: of the clock, and of this process's threads."""
    batches = side.batches()
    side.step(next(batches), Parts(False, parts.device))
    begin, work, steps = parts.now(), time.process_time(), 0
    while True:
        with parts(PARTS[0]):
            batch = next(batches, None)
        if batch is None:
            return (parts.now() - begin) / steps, (time.process_time() - work) / steps
        side.step(batch, parts)
        steps += 1


def profile(side: CommonLoop | Ours, title: str, device: torch.device) -> list[str]:
    parts, turns = Parts(True, device), 3
    per_step = [turn(side, parts)[0] for _ in range(turns)]
    whole = sum(per_step) / turns
    steps = round(sum(parts.seconds.values()) / whole)
    who = "common loop" if isinstance(side, CommonLoop) else "ours from the cache" if isinstance(side.teach, Kept) else "ours"
    return [f"{title}, {who}:", *parts.table(steps)]


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    about = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in about.read_text().splitlines() if "model name" in line]
        if about.exists()
        else []
    )
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


if __name__ == "__main__":
    main()
