"""The prepare stage: the data set on disk, and a run record with the report of what is in it."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from pupil import distributed
from pupil.config import HOME
from pupil.data import prepare
from pupil.data.prepare import TEACHER
from pupil.data.report import FILES
from pupil.opening import dvc_tags, group
from pupil.places import Where, empty_or_new, fresh
from pupil.record import Record, environment, flatten, sha256
from pupil.settings import Settings
from pupil.tracking import Stream
from pupil.types import UserError


def run(settings: Settings) -> None:
    """Prepares, tells and records.  What fails leaves no record: nothing was prepared."""
    distributed.refuse("prepare")
    place, started = where(settings), time.time()
    manifest = prepare(settings.data, place.out)
    tell(manifest, place.out)
    track(settings, manifest, place, started)


def tell(manifest: dict[str, Any], out: Path) -> None:
    counts = ", ".join(f"{count} {split}" for split, count in manifest["counts"].items())
    print(
        f"{manifest['name']}: {len(manifest['classes'])} classes, {counts} images of {manifest['image_size']} pixels in {out}; "
        f"report.txt and contact_sheet.png there show them"
    )
    if manifest["teacher_classes"]:
        print(f"the teachers' {len(manifest['teacher_classes'])} classes are in {out / TEACHER}")
    if manifest["dropped"]:
        print(f"{manifest['dropped']} images could not be read and were left out; report.txt lists them")


def track(settings: Settings, manifest: dict[str, Any], place: Where, started: float) -> None:
    """The record, with the report's numbers as metrics and its files as artifacts."""
    name, digest = manifest["name"], manifest["digest"]
    facts = {
        "started": started,
        "stage": "prepare",
        "name": f"prepare {name}",
        "params": flatten({"data": manifest["config"]}),
        "seeds": {"data": settings.data.seed},
        "inputs": {"fingerprint": manifest["fingerprint"]},
        "environment": environment("cpu"),
        "group": group(name),
        "tags": dvc_tags() | {"data.digest": digest},
        "teacher": None,
        "data": {"name": name, "digest": digest, "source": settings.data.path or name},
        "model": None,
    }
    stream = Stream(place.record, HOME, settings.experiment)
    record = Record(place.record, facts, stream.changed)
    final = summary(manifest, json.loads((place.out / "report.json").read_text()))
    for part in (place.out, place.out / TEACHER):
        for file in (part / name for name in FILES):
            if file.exists():
                target = record.artifacts / file.relative_to(place.out)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
    record.finish(final, {"manifest.json": sha256(place.out / "manifest.json")})
    stream.close()


def summary(manifest: dict[str, Any], report: dict[str, Any]) -> dict[str, float]:
    """The numbers of the report, by the names they have in MLflow."""
    twins = report["duplicates"]
    return {
        "classes": len(manifest["classes"]),
        **{f"images/{split}": n for split, n in manifest["counts"].items()},
        "dropped": manifest["dropped"],
        **{f"duplicates/within/{split}": n for split, n in twins["within"].items()},
        **{f"duplicates/across/{pair}": n for pair, n in twins["across"].items()},
        "duplicates/of_different_classes": twins["of_different_classes"],
    }


def where(settings: Settings) -> Where:
    """The folders given, and for what is not given a fresh one below runs/."""
    folder = fresh("prepare")
    place = Where(Path(settings.out or folder / "data"), Path(settings.record or folder / "record"))
    for path in place:
        empty_or_new(path)
    if place.out.resolve() == place.record.resolve():
        raise UserError(f"out and record are both {place.out}; the data and their record need a folder each")
    return place
