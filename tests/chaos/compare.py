"""What a training leaves, as values that must be equal to the bit; time and speed aside."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pupil import record
from tests.pipeline.conftest import Checkout, runs_of

OF_THE_MOMENT = ("images_per_second", "system/")
FACTS = ("final", "params", "inputs", "outputs", "seeds", "status", "stage", "name", "teacher", "data", "model")


def traces(folders: Iterable[Path]) -> dict[str, Any]:
    """Every file below the folders, and what must be equal of it."""
    found: dict[str, Any] = {}
    for path in sorted(p for folder in folders for p in folder.rglob("*") if p.is_file()):
        if path.name == "metrics.jsonl":
            found[str(path)] = [[line["step"], without_speed(line["values"])] for line in record.read_metrics(path.parent)]
        elif path.name == "record.json":
            facts = record.read(path.parent)
            found[str(path)] = {key: facts.get(key) for key in FACTS}
        elif path.name == "config.json":
            found[str(path)] = {k: v for k, v in json.loads(path.read_text()).items() if k != "resume_every"}
        else:
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def without_speed(values: dict[str, float]) -> dict[str, str]:
    """By repr: nan is nan."""
    return {key: repr(value) for key, value in values.items() if not key.startswith(OF_THE_MOMENT)}


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    names = sorted({*expected, *found})
    return [f"{Path(name).name} differs" for name in names if json.dumps(expected.get(name)) != json.dumps(found.get(name))]


def uids(folders: Iterable[Path]) -> list[str]:
    return sorted(record.read(path.parent)["uid"] for folder in folders for path in folder.rglob("record.json"))


def untracked(clone: Checkout, folders: Iterable[Path]) -> list[str]:
    """What is wrong with the runs of these records in the store."""
    wrong = []
    for path in [path for folder in folders for path in folder.rglob("record.json")]:
        facts, lines = record.read(path.parent), record.read_metrics(path.parent)
        runs = [run for run in runs_of(clone) if run.uid == facts["uid"]]
        if [run.status for run in runs] != ["FINISHED"]:
            wrong.append(f"runs in MLflow: {[run.status for run in runs]}")
            continue
        for key in lines[0]["values"]:
            steps = [step for step, _ in runs[0].curves.get(key, [])]
            if steps != [line["step"] for line in lines if key in line["values"]]:
                wrong.append(f"steps of {key} in MLflow: {steps}")
    return wrong
