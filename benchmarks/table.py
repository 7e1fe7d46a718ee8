"""A table of trainings from one pass of the teacher against as many runs of the common loop; prints Markdown, writes JSON.

python -m benchmarks.table [--pair large] [--rows alone,kd,fitnet,...] [--threads 2] [--json table.json]
python -m benchmarks.table --device cuda --overlap         # or --compile true: streams or graphs

The rows are those of SimKD's table: the student alone, KD, FitNet, AT, SP, VID, CRD, SRRL, SemCKD, SimKD with factors 8, 4
and 2.  All train the same made images in one process, by turns of a few steps: each row by the common loop with a teacher of
its own, then all rows side by side as `stages/table.py` trains them.  A ratio is the sum of the common loops / ours.
"""

import argparse
import json
import os
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common_loop import CommonLoop, Images
from benchmarks.step import CLASSES, MEAN, PAIRS, STD, compared, machine, turn
from pupil.data.resident import Augment, Resident
from pupil.fit import teacher_features
from pupil.lanes import Turns, lanes
from pupil.methods import METHODS
from pupil.methods.alone import Alone
from pupil.methods.base import Setup
from pupil.models import build
from pupil.net import Net, probe
from pupil.optim import Optim
from pupil.parts import Parts
from pupil.speed import choose, quick
from pupil.training import Training
from pupil.types import Batch

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "alone": ("alone", {}),
    **{name: (name, {}) for name in ("kd", "fitnet", "at", "sp", "vid", "crd", "srrl", "semckd")},
    **{f"simkd-{factor}": ("simkd", {"factor": factor}) for factor in (8, 4, 2)},
}
STEPS = {"large": 2, "small": 6}  # timed in a turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="large", choices=PAIRS)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--workers", type=int, default=2, help="of the common loop's DataLoader")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="auto", choices=("float32", "bf16", "auto"))
    parser.add_argument("--layout", default="auto", choices=("contiguous", "channels_last", "auto"))
    parser.add_argument("--compile", default="auto", choices=("false", "true", "auto"))
    parser.add_argument("--overlap", action="store_true", help="on a GPU: each student in a CUDA stream of its own")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    names = args.rows.split(",")
    if unknown := set(names) - ROWS.keys():
        parser.error(f"--rows: there is no {', '.join(sorted(unknown))}; known: {', '.join(ROWS)}")
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    compile = "auto" if args.compile == "auto" else args.compile == "true"
    speed = choose(args.precision, args.layout, compile, device)
    print(f"{machine(device)}, {args.threads} threads; {' -> '.join(PAIRS[args.pair])}, batch {args.batch}; ours: {speed}\n")
    common, ours = measure(names, args, speed, device)
    print("| training | common loop, ms per step |\n|---|---|")
    for name, turns in common.items():
        print(f"| {name} | {1e3 * statistics.median(t[0] for t in turns):,.0f} |")
    found = {}
    for i, kind in enumerate(("clock", "processor")):
        sums = [sum((turns[r][i] for turns in common.values()), 0.0) for r in range(args.rounds)]
        ms, ratio, spread = compared([sums, [t[i] for t in ours]])
        found[kind] = {"common_ms": ms[0], "ours_ms": ms[1], "ratio": ratio, "quartiles": spread}
        print(
            f"{'| all |' if not i else ''}{f' {ms[0]:,.0f} |' if not i else ''}\n\n{kind} time: {len(names)} trainings"
            f" {ms[0]:,.0f} ms per step one by one, {ms[1]:,.0f} ms side by side: ratio {ratio:.2f} ({spread[0]:.2f} to"
            f" {spread[1]:.2f})"
        )
    if args.json:
        facts = {"machine": machine(device), "speed": str(speed), "load": os.getloadavg(), "seconds": common, **found}
        args.json.write_text(json.dumps(facts | {k: v for k, v in vars(args).items() if k != "json"}, indent=1) + "\n")


def measure(names: list[str], args: argparse.Namespace, speed: Any, device: torch.device) -> tuple[dict[str, Any], list[Any]]:
    """Seconds per step, of the clock and of the processor, turn by turn: of each row's common loop, and of all side by side."""
    g = torch.Generator().manual_seed(0)
    n = args.batch * (STEPS[args.pair] + 1)
    pixels = torch.randint(0, 256, (n, 3, 32, 32), generator=g, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (n,), generator=g)
    images = Images(pixels, labels, MEAN, STD)
    train = Resident(pixels, labels, MEAN, STD, args.batch, device, 0, Augment(4, True))
    teacher = network(PAIRS[args.pair][0], device).requires_grad_(False).eval()
    literal = {
        name: CommonLoop(ROWS[name][0], made(name, args.pair, labels, teacher), images, args.batch, args.workers, device, False)
        for name in names
    }
    with ExitStack() as stack:
        side_by_side = lanes(len(names), device, args.overlap, speed.graphs)
        ours = Table([made(name, args.pair, labels, teacher) for name in names], teacher, train, side_by_side)
        for i, training in enumerate(ours.trainings):
            stack.enter_context(quick(training.method, None if i else teacher, speed))  # type: ignore[arg-type]
        ours.begin()
        common: dict[str, list[Any]] = {name: [] for name in names}
        together: list[Any] = []
        for r in range(-1, args.rounds):  # the first round is for warming up
            for name, side in literal.items():
                with plain(teacher):
                    seconds = turn(side, Parts(False, device))
                common[name] += [seconds] if r >= 0 else []
            seconds = turn(ours, Parts(False, device))
            together += [seconds] if r >= 0 else []
    return common, together


class plain:
    """For a while the teacher answers as it is, not by its quick copy."""

    def __init__(self, teacher: Net) -> None:
        self.teacher = teacher

    def __enter__(self) -> None:
        self.kind = type(self.teacher)
        self.teacher.__class__ = Net

    def __exit__(self, *error: object) -> None:
        self.teacher.__class__ = self.kind


def network(name: str, device: torch.device) -> Net:
    torch.manual_seed(0)
    return build(name, CLASSES).to(device)


def made(name: str, pair: str, labels: torch.Tensor, teacher: Net) -> Any:
    """A row's method, around a student of its own."""
    device = labels.device if labels.is_cuda else next(teacher.parameters()).device
    student = network(PAIRS[pair][1], device)
    kind, hp = ROWS[name]
    if kind == "alone":
        return Alone(student)
    around = Setup(student, teacher, probe(student, 32), probe(teacher, 32), labels)
    return METHODS[kind](around, METHODS[kind].Config(**hp)).to(device)


class Table:
    """All rows side by side, by the steps of `pupil.fit`."""

    def __init__(self, methods: list[Any], teacher: Net, train: Resident, side_by_side: Turns = Turns()) -> None:
        self.lanes = side_by_side
        self.train, self.teach, self.epoch = train, partial(teacher_features, teacher), 0
        self.trainings = [Training(method, Optim(), train, lambda values, epoch: None) for method in methods]

    def begin(self) -> None:
        for training in self.trainings:
            training.begin(self.train)

    def batches(self) -> Iterator[Batch]:
        self.epoch += 1
        return self.train.epoch(self.epoch)

    def step(self, batch: Batch, parts: Parts) -> None:
        self.lanes.begin()
        t = self.teach(batch)
        for number, training in enumerate(self.trainings):
            training.steps, training.raws = 1, []  # in the midst of an epoch
            with self.lanes.lane(number):
                training.step(batch, t)
        self.lanes.end()


if __name__ == "__main__":
    main()
