"""Trainings from first to last: fit, record, checkpoint, the one reading of the test split, pictures, tracking."""

import contextlib
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pupil import checkpoint, distributed, points
from pupil.assemble import Job, seed_everything
from pupil.cache import answering
from pupil.conclude import conclude
from pupil.config import HOME
from pupil.data import Prepared
from pupil.divided import divided
from pupil.faults import explained
from pupil.feeds import Loaders, loaders, pick_device
from pupil.fit import Log, Teach, Trained, Watch, fit, teacher_features
from pupil.lanes import lanes
from pupil.machine import usage
from pupil.methods.alone import Alone
from pupil.opening import open_record
from pupil.places import PREDICTIONS, Seat, Where, clear, fresh, place_of, where
from pupil.progress import Progress
from pupil.record import Record, sha256
from pupil.resume import Keeper, Stopped, key
from pupil.settings import Settings, plain
from pupil.speed import Speed, choose, quick
from pupil.tracking import Stream, kept
from pupil.training import NotFinite, Training
from pupil.types import UserError

PATIENCE = 5.0  # seconds that what was stopped waits for the tracking store
HOW = ("precision", "layout", "compile", "views")


def run(groups: Sequence[Sequence[Job]], data: Prepared, settings: Settings) -> None:
    """Train each group side by side, one group after another, and leave a model folder and a record folder of each job.

    The jobs of a group have one teacher, seed and optimiser.  Killed at any moment, the same command goes on.
    """
    if distributed.rank():
        follow(groups, data, settings)
        return
    jobs = [job for group in groups for job in group]
    keeper = keeper_of(jobs, data, settings)
    if not (keeper.folder / "claim.json").exists():
        where(settings, jobs[0].stage)  # refuses a folder that holds something
    distributed.spread(settings.processes)
    title = jobs[0].title if len(jobs) == 1 else f"{len(jobs)} students of {jobs[0].params['teacher']}"
    with explained(groups, data, settings, keeper), keeper.holding(title), keeper.listening(), kept(HOME, settings.experiment):
        keeper.claimed(len(jobs), lambda: fresh(jobs[0].stage))
        point = keeper.load()
        distributed.from_first(keeper.point if point else None, distributed.join(pick_device(settings.device)))
        start = 0 if point is None else point["group"]
        for number, group in enumerate(groups[start:], start):
            uids = keeper.claim["uids"][sum(map(len, groups[:number])) :]
            places = [place_of(job, settings, keeper, len(groups) > 1, len(jobs) > 1) for job in group]
            seats = [Seat(*seat) for seat in zip(group, places, uids, strict=False)]
            train_group(seats, data, settings, keeper, number, point)
            point = None


def train_group(
    seats: Sequence[Seat], data: Prepared, settings: Settings, keeper: Keeper, number: int, point: Mapping[str, Any] | None
) -> None:
    first = seats[0].job
    device = distributed.join(pick_device(settings.device))
    feeds = feeds_of(seats, data, settings, device)
    speed = choose(settings.precision, settings.layout, settings.compile, device)
    title = first.title if len(seats) == 1 else f"{len(seats)} students of {first.params['teacher']}, seed {first.seed}"
    print(f"{title}: {feeds.about}; {speed}", flush=True)
    progress = Progress(title, len(feeds.train), students=len(seats))
    records: list[tuple[Record, Stream]] = []
    for seat, lines in zip(seats, [""] * len(seats) if point is None else point["lines"], strict=True):
        clear(seat)
        known = {"uid": seat.uid, "started": keeper.claim["started"]}
        how = {"speed": str(speed), "loader": type(feeds.train).__name__.lower()}
        records.append(open_record(seat.job, data, settings, seat.place, device, how, known, lines))
    if point is not None:
        print(f"{title}: goes on from epoch {point['states'][0]['place'][2]}", flush=True)

    def logger(record: Record) -> Log:
        def log(values: Mapping[str, float], epoch: int) -> None:
            data.refuse_changed()
            record.log({**values, **usage(device)}, epoch)
            progress.log(values, epoch)

        return log

    def keep(trainings: Sequence[Training]) -> None:
        if keeper.due() or all(training.finished for training in trainings):
            data.refuse_changed()
            states = [training.state() for training in trainings]
            saved = keeper.save({"group": number, "states": states, "lines": [record.lines() for record, _ in records]})
            keeper.stop(saved)

    status = "FAILED"
    try:
        states = None if point is None else point["states"]
        logs = [logger(record) for record, _ in records]
        trained = train(
            [seat.job for seat in seats], feeds, settings, speed, logs, progress.watch, keep, states, lambda: keeper.stop(True)
        )
        keeper.rest()
        for seat, result, (record, stream) in zip(seats, trained, records, strict=True):
            final = conclude(seat.job, result, data, feeds, settings, seat.place, record)
            data.refuse_changed()
            outputs = {name: sha256(seat.place.out / name) for name in (checkpoint.WEIGHTS, PREDICTIONS)}
            record.finish(final, outputs, "FINISHED")
            stream.close()
            print(f"{seat.job.title}: test top-1 {final['test/top1']:.2f} %  ({seat.place.out})", flush=True)
    except Stopped:
        status = "KILLED"
        raise
    except NotFinite as e:
        raise not_finite(e, feeds, [record for record, _ in records], keeper) from None
    finally:
        keeper.resting, patience = False, time.monotonic() + PATIENCE
        progress.close()
        for record, stream in records:
            if record.facts["status"] == "RUNNING":
                with contextlib.suppress(OSError):  # what went wrong is on its way up
                    record.finish({}, {}, status)
                stream.close(max(0.1, patience - time.monotonic()))


def not_finite(e: NotFinite, feeds: Loaders, records: Sequence[Record], keeper: Keeper) -> UserError:
    """Keeps the images of the step that went wrong; says where the last good state is."""
    ids = feeds.train.order(e.epoch).split(feeds.train.batch_size)[e.step].tolist()
    for record in records:
        record.attach("not_finite.json", {"error": str(e), "epoch": e.epoch, "step": e.step + 1, "training_images": ids})
    return UserError(
        f"{e}.  Its {len(ids)} images are in {records[0].artifacts}/not_finite.json, the last good state in {keeper.point}"
    )


def to_device(job: Job, device: torch.device) -> None:
    job.method.to(device)
    if job.teacher is not None:
        job.teacher.to(device)


def feeds_of(seats: Sequence[Seat], data: Prepared, settings: Settings, device: torch.device) -> Loaders:
    """The batches of a group, on whose device its networks then are."""
    job, two_views = seats[0].job, any(seat.job.method.two_views for seat in seats)
    feeds = loaders(data, job.optim.batch_size, job.seed, device, settings.loader, two_views, job.views)
    for seat in seats:
        to_device(seat.job, device)
    return feeds


def follow(groups: Sequence[Sequence[Job]], data: Prepared, settings: Settings) -> None:
    """Train beside the first process, which writes and speaks."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the first process stops for all
    device = distributed.join(pick_device(settings.device))
    raw = distributed.from_first(None, device)
    point = None if raw is None else points.parse(raw)
    start = 0 if point is None else point["group"]
    for group in groups[start:]:
        seats = [Seat(job, Where(Path(), Path()), "") for job in group]
        feeds, speed = (
            feeds_of(seats, data, settings, device),
            choose(settings.precision, settings.layout, settings.compile, device),
        )
        logs: list[Log] = [lambda values, epoch: None for _ in group]
        states = None if point is None else point["states"]
        train(group, feeds, settings, speed, logs, lambda batches, *about: iter(batches), lambda trainings: None, states)
        point = None


def train(
    jobs: Sequence[Job],
    feeds: Loaders,
    settings: Settings,
    speed: Speed,
    logs: Sequence[Log],
    watch: Watch,
    keep: Callable[[Sequence[Training]], None] = lambda trainings: None,
    states: Sequence[Mapping[str, Any]] | None = None,
    halt: Callable[[], None] = lambda: None,
) -> list[Trained]:
    """The jobs of a group, from their beginning or from `states`; `halt` may end it before it begins."""
    teach = teaching(jobs[0], feeds, speed, halt)
    papers = feeds.test if settings.protocol.papers_best_on_test else None
    with ExitStack() as stack:
        trainings = []
        for i, (job, log) in enumerate(zip(jobs, logs, strict=True)):
            teacher = None if i else job.teacher  # it is the same one for all
            stack.enter_context(divided(job.method, teacher))
            stack.enter_context(quick(job.method, teacher, speed))
            seed_everything("training", job.seed)
            trainings.append(Training(job.method, job.optim, feeds.val, log, papers))
        for training, state in zip(trainings, states or [], strict=False):
            training.restore(state)
        side_by_side = lanes(len(jobs), feeds.train.device, settings.overlap, speed.graphs)
        return fit(trainings, teach, feeds.train, watch, lambda: keep(trainings), side_by_side)


def keeper_of(jobs: Sequence[Job], data: Prepared, settings: Settings) -> Keeper:
    """By everything that makes these trainings what they are."""
    own = [
        "data",
        "optim",
        "teacher",
        "student",
        "protocol",
        "train",
        "distill",
        "prepared",
        "out",
        "loader",
        "processes",
        *HOW,
    ]
    tree = plain(settings)
    facts = {
        "settings": {name: tree[name] for name in own},
        "jobs": [[job.stage, job.title, job.params, job.meta] for job in jobs],
        "data": data.manifest["digest"],
        "device": pick_device(settings.device).type,
    }
    return Keeper(HOME / ".work" / "resume" / key(facts), settings.resume_every)


def teaching(job: Job, feeds: Loaders, speed: Speed, halt: Callable[[], None]) -> Teach:
    """The teacher, or what is kept of it."""
    if job.views is None or isinstance(job.method, Alone):
        return partial(teacher_features, job.teacher)
    root, taught = HOME / ".work" / "cache", job.meta["teacher"]
    return answering(root, job.method, taught, feeds.data, feeds.train, job.views, speed, halt)
