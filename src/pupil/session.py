"""One training from first to last: fit, record, checkpoint, the one reading of the test split, pictures, tracking."""

import os
import time
import uuid
from collections.abc import Mapping
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
from pupil.scoring import predict, score_answers
from pupil.settings import Settings, plain
from pupil.speed import Speed, choose, quick
from pupil.tracking import Stream, parent_from_environment
from pupil.training import Training
from pupil.types import UserError

PREDICTIONS = "predictions.safetensors"


class Where(NamedTuple):
    """Where a stage writes."""

    out: Path
    record: Path


def run(job: Job, data: Prepared, settings: Settings) -> None:
    """Train, and leave a model folder and a record folder."""
    if distributed.rank():
        follow(job, data, settings)
        return
    place = where(settings, job.stage)
    distributed.spread(settings.processes)
    device = distributed.join(pick_device(settings.device))
    feeds = loaders(data, job.optim.batch_size, job.seed, device, settings.loader, job.method.two_views, job.views)
    speed = choose(settings.precision, settings.layout, settings.compile, device)
    print(f"{job.title}: {feeds.about}; {speed}", flush=True)
    to_device(job, device)
    progress = Progress(job.title, len(feeds.train))
    record, stream = open_record(job, data, settings, place, device, speed)

    def log(values: Mapping[str, float], epoch: int) -> None:
        record.log({**values, **usage(device)}, epoch)
        progress.log(values, epoch)

    final: dict[str, float] = {}
    outputs: dict[str, str] = {}
    status = "FAILED"
    try:
        trained = train(job, feeds, settings, speed, log, progress.watch)
        final = conclude(job, trained, data, feeds, settings, place, record)
        outputs = {name: sha256(place.out / name) for name in (checkpoint.WEIGHTS, PREDICTIONS)}
        status = "FINISHED"
    finally:
        progress.close()
        record.finish(final, outputs, status)
        stream.close()
    print(f"{job.title}: test top-1 {final['test/top1']:.2f} %  ({place.out})", flush=True)


def follow(job: Job, data: Prepared, settings: Settings) -> None:
    """Train beside the first process, which writes and speaks."""
    device = distributed.join(pick_device(settings.device))
    feeds = loaders(data, job.optim.batch_size, job.seed, device, settings.loader, job.method.two_views, job.views)
    to_device(job, device)
    speed = choose(settings.precision, settings.layout, settings.compile, device)
    train(job, feeds, settings, speed, lambda values, epoch: None, lambda batches, *about: iter(batches))


def train(job: Job, feeds: Loaders, settings: Settings, speed: Speed, log: Log, watch: Watch) -> Trained:
    teach = teaching(job, feeds, speed)
    seed_everything("training", job.seed)
    papers = feeds.test if settings.protocol.papers_best_on_test else None
    with divided(job.method, job.teacher), quick(job.method, job.teacher, speed):
        training = Training(job.method, job.optim, feeds.val, log, papers)
        (trained,) = fit([training], teach, feeds.train, watch)
    return trained


def teaching(job: Job, feeds: Loaders, speed: Speed) -> Teach:
    """The teacher, or what is kept of it."""
    if job.views is None or isinstance(job.method, Alone):
        return partial(teacher_features, job.teacher)
    return answering(HOME / ".work/cache", job.method, job.meta["teacher"], feeds.data, feeds.train, job.views, speed)


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
    job: Job, data: Prepared, settings: Settings, place: Where, device: torch.device, speed: Speed | None = None
) -> tuple[Record, Stream]:
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
    }
    stream = Stream(place.record, HOME, settings.experiment)
    record = Record(place.record, facts, stream.changed)
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
