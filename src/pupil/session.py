"""Trainings from first to last: fit, record, checkpoint, the one reading of the test split, pictures, tracking."""

import contextlib
import os
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pupil import checkpoint, distributed, figures, measures
from pupil.arrays import save_arrays
from pupil.assemble import Job, Loaders, loaders, pick_device, seed_everything
from pupil.cache import answering
from pupil.config import HOME, pipeline_key
from pupil.data import Prepared
from pupil.divided import divided
from pupil.fit import Log, Teach, Trained, Watch, fit, teacher_features
from pupil.machine import describe, usage
from pupil.methods.alone import Alone
from pupil.progress import Progress
from pupil.record import Record, environment, flatten, read, read_metrics, sha256
from pupil.resume import Keeper, Stopped, key
from pupil.scoring import predict, score_answers
from pupil.settings import Settings, plain
from pupil.speed import Speed, choose, quick
from pupil.tracking import Stream, parent_from_environment
from pupil.training import NotFinite, Training
from pupil.types import UserError

PREDICTIONS = "predictions.safetensors"
HOW = ("precision", "layout", "compile", "views")


class Where(NamedTuple):
    """Where a stage writes."""

    out: Path
    record: Path


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
    with keeper.holding(title), keeper.listening():
        keeper.claimed(len(jobs), lambda: fresh(jobs[0].stage))
        point = keeper.load()
        start = 0 if point is None else point["group"]
        for number, group in enumerate(groups[start:], start):
            uids = keeper.claim["uids"][sum(map(len, groups[:number])) :]
            places = [place_of(job, settings, keeper, len(groups) > 1, len(jobs) > 1) for job in group]
            seats = [Seat(*seat) for seat in zip(group, places, uids, strict=False)]
            train_group(seats, data, settings, keeper, number, point)
            point = None


class Seat(NamedTuple):
    """A job, and where its results go."""

    job: Job
    place: Where
    uid: str  # of its record


def train_group(
    seats: Sequence[Seat], data: Prepared, settings: Settings, keeper: Keeper, number: int, point: Mapping[str, Any] | None
) -> None:
    first = seats[0].job
    device = distributed.join(pick_device(settings.device))
    feeds = feeds_of(seats, data, settings, device)
    speed = choose(settings.precision, settings.layout, settings.compile, device)
    title = first.title if len(seats) == 1 else f"{len(seats)} students of {first.params['teacher']}, seed {first.seed}"
    print(f"{title}: {feeds.about}; {speed}", flush=True)
    progress = Progress(title, len(feeds.train))
    records: list[tuple[Record, Stream]] = []
    for seat, lines in zip(seats, [""] * len(seats) if point is None else point["lines"], strict=True):
        clear(seat)
        known = {"uid": seat.uid, "started": keeper.claim["started"]}
        records.append(open_record(seat.job, data, settings, seat.place, device, speed, known, lines))
    if point is not None:
        print(f"{title}: goes on from epoch {point['states'][0]['place'][2]}", flush=True)

    def logger(record: Record) -> Log:
        def log(values: Mapping[str, float], epoch: int) -> None:
            record.log({**values, **usage(device)}, epoch)
            progress.log(values, epoch)

        return log

    def keep(trainings: Sequence[Training]) -> None:
        if keeper.due() or all(training.finished for training in trainings):
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
        for seat, result, (record, stream) in zip(seats, trained, records, strict=True):
            final = conclude(seat.job, result, data, feeds, settings, seat.place, record)
            outputs = {name: sha256(seat.place.out / name) for name in (checkpoint.WEIGHTS, PREDICTIONS)}
            record.finish(final, outputs, "FINISHED")
            stream.close()
            print(f"{seat.job.title}: test top-1 {final['test/top1']:.2f} %  ({seat.place.out})", flush=True)
    except Stopped:
        status = "KILLED"
        raise
    except NotFinite as e:
        raise not_finite(e, feeds, [record for record, _ in records], keeper) from None
    except OSError as e:
        raise UserError(
            f"cannot write {e.filename or 'the results'}: {e.strerror or e}; mend that and run the same command: it goes on"
        ) from e
    finally:
        progress.close()
        for record, stream in records:
            if record.facts["status"] == "RUNNING":
                with contextlib.suppress(OSError):  # what went wrong is on its way up
                    record.finish({}, {}, status)
                stream.close()


def not_finite(e: NotFinite, feeds: Loaders, records: Sequence[Record], keeper: Keeper) -> UserError:
    """Keeps the images of the step that went wrong; says where the last good state is."""
    ids = feeds.train.order(e.epoch).split(feeds.train.batch_size)[e.step].tolist()
    for record in records:
        record.attach("not_finite.json", {"error": str(e), "epoch": e.epoch, "step": e.step + 1, "training_images": ids})
    return UserError(
        f"{e}.  Its {len(ids)} images are in {records[0].artifacts}/not_finite.json, the last good state in {keeper.point}"
    )


def feeds_of(seats: Sequence[Seat], data: Prepared, settings: Settings, device: torch.device) -> Loaders:
    """The batches of a group, on whose device its networks then are."""
    job, two_views = seats[0].job, any(seat.job.method.two_views for seat in seats)
    feeds = loaders(data, job.optim.batch_size, job.seed, device, settings.loader, two_views, job.views)
    for seat in seats:
        to_device(seat.job, device)
    return feeds


def follow(groups: Sequence[Sequence[Job]], data: Prepared, settings: Settings) -> None:
    """Train beside the first process, which writes and speaks."""
    keeper = keeper_of([job for group in groups for job in group], data, settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the first process stops for all
    device = distributed.join(pick_device(settings.device))  # by then the first process has read the point
    point = keeper.load()
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
        return fit(trainings, teach, feeds.train, watch, lambda: keep(trainings))


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


def place_of(job: Job, settings: Settings, keeper: Keeper, seeds: bool, several: bool) -> Where:
    """Below the folders of the settings, or of the first attempt."""
    given = settings.out is not None and settings.record is not None
    out, record = (Path(settings.out or ""), Path(settings.record or "")) if given else (Path(keeper.claim["folder"]),) * 2
    below = Path(*[str(job.seed)] * seeds, *[str(job.params.get("method"))] * several)
    return Where(out / below, record / below) if given else Where(out / below / "model", record / below / "record")


def clear(seat: Seat) -> None:
    """What an attempt that was killed has left."""
    out, folder = seat.place
    with contextlib.suppress(OSError, ValueError, KeyError):
        if read(folder)["uid"] == seat.uid:
            shutil.rmtree(folder)
            for name in (checkpoint.WEIGHTS, checkpoint.META, PREDICTIONS):
                (out / name).unlink(missing_ok=True)
                (out / f"{name}.new").unlink(missing_ok=True)
    for path in seat.place:
        empty_or_new(path)


def teaching(job: Job, feeds: Loaders, speed: Speed, halt: Callable[[], None]) -> Teach:
    """The teacher, or what is kept of it."""
    if job.views is None or isinstance(job.method, Alone):
        return partial(teacher_features, job.teacher)
    root, taught = HOME / ".work" / "cache", job.meta["teacher"]
    return answering(root, job.method, taught, feeds.data, feeds.train, job.views, speed, halt)


def conclude(
    job: Job, trained: Trained, data: Prepared, feeds: Loaders, settings: Settings, place: Where, record: Record
) -> dict[str, float]:
    """Save what is deployed; read the test split, once; draw.  Gives the run's final metrics."""
    net, deploy = job.method.student, settings.protocol.deploy
    candidates = {"last": trained.last, "best_by_val": trained.best_by_val}
    logits, labels = predict_each(net, candidates, feeds)
    chosen = logits[deploy]
    final = {f"test/{name}": value for name, value in measures.quality(chosen, labels).items()}
    final |= {f"test/{name}/top1": measures.quality(z, labels)["top1"] for name, z in logits.items()}
    net.load_state_dict(candidates[deploy])
    final |= {f"test/{name}/top1": top1 for name, top1 in score_answers(job.method, feeds.test).items()}
    if trained.best_on_test is not None:
        final["papers_protocol/best_on_test/top1"] = trained.best_on_test
    last_epoch = read_metrics(record.folder)[-1]["step"]
    meta = {
        **job.meta,
        **checkpoint.seen(data.manifest),
        "data": {"name": data.manifest["name"], "digest": data.manifest["digest"]},
        "selection": deploy,
        "epoch": last_epoch if deploy == "last" else trained.best_epoch,
        "metrics": {**{name: final[name] for name in ("test/top1", "test/nll")}, "test/images": len(labels)},
    }
    final["best_by_val/epoch"] = trained.best_epoch
    checkpoint.save(place.out, candidates[deploy], meta)
    arrays = {"labels": labels, "deployed": chosen.clone(), **logits}
    if job.teacher is not None and "cut" in job.meta["teacher"]:  # its own training left the answers of all its outputs
        arrays["teacher"], _ = predict(job.teacher, feeds.test)
        final["test/teacher/top1"] = measures.quality(arrays["teacher"], labels)["top1"]
    save_arrays(place.out / PREDICTIONS, arrays)
    table = measures.confusion(chosen, labels)
    names = data.manifest["classes"]
    images, observed = data.splits["test"][0], job.method.observed()
    shown = (images, names, observed, job.method.pictures(), data.splits["train"])
    figures.draw_all(record.artifacts, read_metrics(record.folder), table, chosen, labels, *shown)
    return final


def predict_each(
    net: torch.nn.Module, candidates: Mapping[str, Mapping[str, Tensor]], feeds: Loaders
) -> tuple[dict[str, Tensor], Tensor]:
    """Test logits of several sets of weights; equal sets are run once."""
    logits: dict[str, Tensor] = {}
    labels = feeds.test.labels.cpu()
    for name, state in candidates.items():
        twin = next((n for n in logits if all(torch.equal(state[k], candidates[n][k]) for k in state)), None)
        if twin is None:
            net.load_state_dict(state)
            logits[name], labels = predict(net, feeds.test)
        else:
            logits[name] = logits[twin].clone()
    return logits, labels


def open_record(
    job: Job,
    data: Prepared,
    settings: Settings,
    place: Where,
    device: torch.device,
    speed: Speed | None = None,
    known: Mapping[str, Any] = {},
    lines: str = "",
) -> tuple[Record, Stream]:
    """`known` and `lines`: facts and metrics of an earlier attempt."""
    facts = {
        "stage": job.stage,
        "name": job.title,
        "params": {
            **flatten(job.params),
            **flatten({"data": data.manifest["config"]}),
            "protocol.deploy": settings.protocol.deploy,
            **({} if speed is None else {"speed": str(speed)}),  # an import trains nothing
        },
        "seeds": ({} if job.imported else {"network": job.seed, "batches": job.seed}) | {"data": settings.data.seed},
        "inputs": {
            "data": data.manifest["digest"],
            **({"checkpoint": job.imported["sha256"]} if job.imported else {}),
            **({"teacher": sha256(job.teacher_folder / checkpoint.WEIGHTS)} if job.teacher_folder else {}),
        },
        "environment": environment(describe(device)),
        "group": group(data.manifest["name"]),
        "tags": dvc_tags(),
        "teacher": teacher_run(job, place),
        "data": {
            "name": data.manifest["name"],
            "digest": data.manifest["digest"],
            "source": settings.data.path or data.manifest["name"],
        },
        "model": os.path.relpath(place.out, place.record),
        **known,
    }
    stream = Stream(place.record, HOME, settings.experiment)
    record = Record(place.record, facts, stream.changed, lines)
    record.attach("config.json", {k: v for k, v in plain(settings).items() if k != "given"})
    return record, stream


def group(data_name: str) -> dict[str, str] | None:
    """The parent of this run: that of `mlflow run`, else the pipeline that DVC runs; a run by hand has none."""
    parent = parent_from_environment()
    if parent is not None or "DVC_STAGE" not in os.environ:
        return parent
    key = pipeline_key()
    return {"key": key, "name": f"pipeline {data_name} {key[:6]}"}


def dvc_tags() -> dict[str, str]:
    """Which stage and experiment of DVC this is, if DVC runs it."""
    names = {"dvc.stage": "DVC_STAGE", "dvc.experiment": "DVC_EXP_NAME"}
    return {tag: os.environ[variable] for tag, variable in names.items() if variable in os.environ}


def teacher_run(job: Job, place: Where) -> dict[str, Any] | None:
    """The teacher, and its run if its record lies where the pipeline leaves it."""
    if job.teacher_folder is None:
        return None
    weights = sha256(job.teacher_folder / checkpoint.WEIGHTS)
    facts = checkpoint.read_meta(job.teacher_folder)
    parts = ["records" if part == "models" else part for part in job.teacher_folder.parts]
    folder = Path(*parts) if "models" in job.teacher_folder.parts else job.teacher_folder.with_name("record")
    uid = None
    if (folder / "record.json").exists():
        theirs = read(folder)
        uid = theirs["uid"] if theirs.get("outputs", {}).get(checkpoint.WEIGHTS) == weights else None
    return {"network": facts["network"], "sha256": weights, "uid": uid}


def where(settings: Settings, stage: str) -> Where:
    """The folders dvc.yaml gives, or fresh ones below runs/.  What is there is never overwritten."""
    if (settings.out is None) != (settings.record is None):
        raise UserError("out and record go together: give both, or neither for a folder of its own below runs/")
    if settings.out is None or settings.record is None:
        folder = fresh(stage)
        return Where(folder / "model", folder / "record")
    place = Where(Path(settings.out), Path(settings.record))
    for path in place:
        empty_or_new(path)
    return place


def fresh(stage: str) -> Path:
    """A folder of its own for a run by hand, below the checkout."""
    return HOME / "runs" / f"{stage}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"


def empty_or_new(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is not empty; nothing is overwritten: choose another folder or remove it")


def to_device(job: Job, device: torch.device) -> None:
    job.method.to(device)
    if job.teacher is not None:
        job.teacher.to(device)


def where_report(settings: Settings) -> Path:
    """Where the evaluate stage keeps its record."""
    if settings.record is None:
        return fresh("evaluate") / "record"
    empty_or_new(Path(settings.record))
    return Path(settings.record)
