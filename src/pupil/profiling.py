"""`python -m pupil profile`: a few steps of one configured training, measured, with its own loader, settings and device.

The cell is that of stages/distill.py.  Where the teacher is not trained yet, an untrained one of its kind costs the same.
Nothing is written.
"""

import itertools
import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch

from pupil import flops
from pupil.assemble import build_method, distillation, find, prepared, student
from pupil.data import Prepared
from pupil.feeds import Loaders, loaders, pick_device
from pupil.fit import activate, teacher_features
from pupil.methods.base import Method
from pupil.net import Net
from pupil.optim import make_optimizer
from pupil.parts import PARTS, Parts
from pupil.settings import Settings
from pupil.speed import choose, quick
from pupil.types import Batch

WARM, STEPS, PARTED = 3, 20, 8  # steps: not counted, timed as they are, timed part by part


class Trial(NamedTuple):
    title: str
    method: Method
    teacher: Net


def profile(settings: Settings) -> None:
    """Prints time per step, per epoch and per part, and FLOP/s against a measured peak."""
    data = prepared(settings)
    trial, device = trial_of(settings, data), pick_device(settings.device)
    feeds = loaders(data, settings.optim.batch_size, 0, device, settings.loader, trial.method.two_views)
    speed = choose(settings.precision, settings.layout, settings.compile, device)
    print(f"{trial.title}: {feeds.about}; {speed}", flush=True)
    trial.method.to(device)
    trial.teacher.to(device)
    phase = trial.method.phases()[-1]
    if phase.before is not None:
        phase.before(feeds.train.epoch(0))
    activate(trial.method, phase)
    optimizer, _ = make_optimizer(phase, settings.optim)
    batches, plain, parts = endless(feeds), Parts(False, device), Parts(True, device)

    teach = partial(teacher_features, trial.teacher)

    def step(how: Parts) -> None:
        with how(PARTS[0]):
            batch = next(batches)
        how.step(trial.method, teach, batch, phase, optimizer)

    begin = timed(lambda: next(batches), device)
    computed = flops.count(lambda: step(plain))
    with quick(trial.method, trial.teacher, speed):
        for _ in range(WARM):
            step(plain)
        seconds = [timed(lambda: step(plain), device) for _ in range(STEPS)]
        for _ in range(PARTED):
            step(parts)
    middle, batch_size = statistics.median(seconds), settings.optim.batch_size
    low, _, high = statistics.quantiles(seconds, n=4)
    print(
        f"  {1e3 * middle:.1f} ms a step (quartiles {1e3 * low:.1f} to {1e3 * high:.1f}), {batch_size / middle:,.0f} images/s"
    )
    number = len(feeds.train)
    epoch = begin + number * statistics.fmean(seconds)
    print(f"  {epoch:,.1f} s for the {number} steps of an epoch, {begin:.2f} of them until its first batch; no validation")
    print(*parts.table(PARTED), sep="\n")
    dtype = torch.bfloat16 if speed.bf16 else torch.float32
    print(f"  {flops.told(computed, middle, flops.peak(device, dtype), dtype)}")


def trial_of(settings: Settings, data: Prepared) -> Trial:
    cell, m = settings.distill, data.manifest
    teacher = cell.teacher or settings.teachers[0]
    if (find(cell.checkpoint or f"out/models/teacher/{teacher}") / "model.json").exists():
        job = distillation(settings, data)
        assert isinstance(job.method, Method)
        assert job.teacher is not None
        return Trial(job.title, job.method, job.teacher)
    network, name = cell.student or settings.students[0], cell.method or settings.methods[0]
    classes, size, labels = len(m["classes"]), m["image_size"], data.splits["train"][1]
    untrained = student(teacher, classes, 0, size).requires_grad_(False).eval()
    net, hp = student(network, classes, 0, size), settings.hp[name]
    method = build_method(name, net, untrained, size, labels, hp, 0, settings.optim.batch_size)
    return Trial(f"{network} by {name} from an untrained {teacher}", method, untrained)


def endless(feeds: Loaders) -> Iterator[Batch]:
    """Epoch after epoch, whole batches only where there are any: a smaller one would not be a step like the others."""
    train = feeds.train
    for number in itertools.count(1):
        yield from (b for b in train.epoch(number) if len(b.labels) == min(train.batch_size, train.samples))


def timed(call: object, device: torch.device) -> float:
    assert callable(call)
    flops.synchronize(device)
    start = time.perf_counter()
    call()
    flops.synchronize(device)
    return time.perf_counter() - start
