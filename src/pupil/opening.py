"""The record of a training, and its stream to MLflow."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pupil import checkpoint
from pupil.assemble import Job
from pupil.config import HOME, pipeline_key
from pupil.data import Prepared
from pupil.machine import describe
from pupil.places import Where
from pupil.record import Record, environment, flatten, read, sha256
from pupil.settings import Settings, plain
from pupil.tracking import Stream, parent_from_environment


def open_record(
    job: Job,
    data: Prepared,
    settings: Settings,
    place: Where,
    device: torch.device,
    how: Mapping[str, str] = {},
    known: Mapping[str, Any] = {},
    lines: str = "",
) -> tuple[Record, Stream]:
    """`how`: by which means it is trained, where it is; `known` and `lines`: facts and metrics of an earlier attempt."""
    facts = {
        "stage": job.stage,
        "name": job.title,
        "params": {
            **flatten(job.params),
            **flatten({"data": data.manifest["config"]}),
            "protocol.deploy": settings.protocol.deploy,
            **how,
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
