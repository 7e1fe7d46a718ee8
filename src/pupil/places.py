"""Where a training writes.  What is there is never overwritten, but for what a killed attempt at the same has left."""

import contextlib
import shutil
import time
import uuid
from pathlib import Path
from typing import NamedTuple

from pupil import checkpoint, disk
from pupil.assemble import Job
from pupil.config import HOME
from pupil.record import read
from pupil.resume import Keeper
from pupil.settings import Settings
from pupil.types import UserError

PREDICTIONS = "predictions.safetensors"


class Where(NamedTuple):
    """Where a stage writes."""

    out: Path
    record: Path


class Seat(NamedTuple):
    """A job, and where its results go."""

    job: Job
    place: Where
    uid: str  # of its record


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
    disk.refuse_unwritable(path)


def where_report(settings: Settings) -> Path:
    """Where the evaluate stage keeps its record."""
    if settings.record is None:
        return fresh("evaluate") / "record"
    empty_or_new(Path(settings.record))
    return Path(settings.record)


def place_of(job: Job, settings: Settings, keeper: Keeper, seeds: bool, several: bool) -> Where:
    """Below the folders of the settings, or of the first attempt."""
    given = settings.out is not None and settings.record is not None
    out, record = (Path(settings.out or ""), Path(settings.record or "")) if given else (Path(keeper.claim["folder"]),) * 2
    below = Path(*[str(job.seed)] * seeds, *[str(job.params.get("method"))] * several)
    return Where(out / below, record / below) if given else Where(out / below / "model", record / below / "record")


def clear(seat: Seat) -> None:
    """What an attempt that was killed has left."""
    out, folder = seat.place
    (folder / "record.json.new").unlink(missing_ok=True)
    with contextlib.suppress(OSError, ValueError, KeyError):
        if read(folder)["uid"] == seat.uid:
            for name in (checkpoint.WEIGHTS, checkpoint.META, PREDICTIONS):
                (out / name).unlink(missing_ok=True)
                (out / f"{name}.new").unlink(missing_ok=True)
            shutil.rmtree(folder / "artifacts", ignore_errors=True)
            (folder / "metrics.jsonl").unlink(missing_ok=True)
            (folder / "record.json").unlink()  # the last: it says whose all of this is
    for path in seat.place:
        empty_or_new(path)
