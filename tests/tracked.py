"""Records as a training leaves them, and what the store must show of them."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pupil import record, tracking
from pupil.record import Record
from pupil.tracking.store import find_runs

SRC = Path(record.__file__).parents[1]


def facts(**more: Any) -> dict[str, Any]:
    return {
        "stage": "distill",
        "name": "resnet8 by kd",
        "params": {"lr": 0.1, "classes": "x" * 7000, **{f"p{i}": i for i in range(150)}},
        "environment": {"git_commit": "abc", "command": ["distill.py", "seed=1"]},
        "group": {"key": "pipe-1", "name": "pipeline"},
        "teacher": {"network": "resnet20", "sha256": "00", "uid": "teacher-uid"},
        "data": {"name": "cifar", "digest": "d" * 64, "source": "https://example.org/x.zip"},
        **more,
    }


def epochs(record: Record, first: int, last: int, **more: float) -> None:
    for step in range(first, last + 1):
        record.log({"val/top1": 50.0 + step, "loss": math.nan if step == 2 else 1 / step, **more}, step)


def finished(folder: Path, status: str = "FINISHED", **more: Any) -> Record:
    record = Record(folder, facts(**more))
    epochs(record, 1, 3)
    (record.artifacts / "table.csv").write_text("a,b\n")
    record.finish({"test/top1": 51.5, "val/top1": 53.0}, {"model.safetensors": "ff"}, status)
    return record


def runs(home: Path) -> tuple[Any, list[Any]]:
    store = tracking.connect(home, "pupil")
    return store.client, find_runs(store, "tags.`pupil.record` LIKE '%'")


def assert_mirrored(home: Path, record: Record) -> Any:
    """Everything in the record is in the store, once."""
    client, found = runs(home)
    (run,) = [r for r in found if r.data.tags["pupil.record"] == record.facts["uid"]]
    lines = [json.loads(line) for line in (record.folder / "metrics.jsonl").read_text().splitlines()]
    expected: dict[str, list[tuple[int, int, str]]] = {}
    for line in lines:
        for key, value in line["values"].items():
            expected.setdefault(key, []).append((line["step"], int(line["time"] * 1000), repr(float(value))))
    ended = int(record.facts["ended"] * 1000)
    for key, value in record.facts["final"].items():
        here = expected.setdefault(key, [])
        if (lines[-1]["step"], repr(value)) not in [(s, v) for s, _, v in here]:
            here.append((lines[-1]["step"], ended, repr(value)))
    for key, points in expected.items():
        assert sorted((p.step, p.timestamp, repr(p.value)) for p in client.get_metric_history(run.info.run_id, key)) == sorted(
            points
        )
    assert set(run.data.metrics) == set(expected)
    assert set(run.data.params) == set(record.facts["params"])
    assert run.data.params["classes"].startswith("7000 characters, sha256 ")
    assert run.info.status == record.facts["status"]
    assert (run.info.start_time, run.info.end_time) == (int(record.facts["started"] * 1000), ended)
    assert run.info.run_name == record.facts["name"]
    assert [d.dataset.digest for d in run.inputs.dataset_inputs] == ["d" * 36]
    tags = {
        "pupil.teacher": "teacher-uid",
        "pupil.stage": "distill",
        "pupil.complete": "true",
        "mlflow.source.git.commit": "abc",
    }
    assert tags.items() <= run.data.tags.items()
    assert {"record.json", "table.csv"} <= {f.path for f in client.list_artifacts(run.info.run_id)}
    return run


TRAIN = """
import sys, time
from pathlib import Path
from pupil import record, tracking
home, folder, pause = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]) / 20
group = {"key": "pipe-1", "name": "pipeline"}
stream = tracking.Stream(folder, home, "pupil")
r = record.Record(folder, {"stage": "train", "name": folder.name, "params": {"lr": 0.1}, "group": group}, stream.changed)
for step in range(1, 21):
    r.log({"loss": 1 / step, "val/top1": step}, step)
    time.sleep(pause)
r.finish({"test/top1": 1.0}, {})
start = time.monotonic()
stream.close()
print("closed", time.monotonic() - start, time.time(), flush=True)
"""


def train(home: Path, folder: Path, seconds: float = 0.4, **env: str) -> subprocess.Popen[str]:
    """A process that writes a record of 20 epochs, with its stream."""
    command = [sys.executable, "-W", "error::DeprecationWarning:pupil", "-c", TRAIN, str(home), str(folder), str(seconds)]
    full = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(SRC), os.environ.get("PYTHONPATH")))), **env}
    return subprocess.Popen(command, env=full, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
