"""Trainings that are interrupted and go on, and pushes that are cut off: one run, every point once."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pupil import record, tracking
from pupil.record import Record
from pupil.types import UserError
from tests.tracked import SRC, assert_mirrored, epochs, facts, finished, runs, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:::(mlflow|pydantic|sqlalchemy|alembic|google).*"),
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning"),  # sqlite connections that MLflow keeps until the end
]


def resumed(folder: Path, uid: str, started: float, upto: int) -> Record:
    """What a training that goes on after epoch `upto` writes: the same uid, the epochs until then, the others once more."""
    kept = "".join(f"{line}\n" for line in (folder / "metrics.jsonl").read_text().splitlines()[:upto])
    shutil.rmtree(folder)  # as DVC does before a stage
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(kept)
    return Record(folder, facts(uid=uid, started=started))


def steps(home: Path) -> tuple[str, dict[str, list[int]]]:
    """Status of the one run, and the steps of its metrics."""
    client, (run,) = runs(home)
    found = {key: [p.step for p in client.get_metric_history(run.info.run_id, key)] for key in run.data.metrics}
    return run.info.status, found


@pytest.mark.parametrize("end", ["SIGKILL", "KILLED", "FAILED"])
def test_a_training_that_goes_on_has_one_run_with_every_step_once(home: Path, end: str) -> None:
    folder, store, keys = home / "out" / "a", tracking.connect(home, "pupil"), ("val/top1", "loss", "speed")
    first = Record(folder, facts())
    epochs(first, 1, 3, speed=100.0)
    mirror = tracking.Mirror(folder, store)
    assert not mirror.push()
    epochs(first, 4, 5, speed=100.0)
    if end == "SIGKILL":  # the record stays RUNNING; the follower sees the end of its input
        mirror.push()
        mirror.abandon()
    else:
        first.finish({}, {}, end)
        assert tracking.sync([home / "out"], home, "pupil") == (0, 1, 0)
        assert tracking.sync([home / "out"], home, "pupil") == (0, 0, 1), "nothing more, as long as it is not resumed"
    assert steps(home) == ("KILLED" if end == "SIGKILL" else end, {key: [1, 2, 3, 4, 5] for key in keys})
    second = resumed(folder, first.facts["uid"], first.facts["started"], upto=3)
    again = tracking.Mirror(folder, store)
    assert not again.push()
    assert steps(home)[0] == "RUNNING", "shown as what it is"
    epochs(second, 4, 6, speed=200.0)  # other speeds for epochs 4 and 5
    assert not again.push()
    (second.artifacts / "table.csv").write_text("a,b\n")
    second.finish({"test/top1": 51.5}, {})
    assert again.push()
    status, found = steps(home)
    assert status == "FINISHED"
    assert found.pop("test/top1") == [6]
    assert found == {key: [1, 2, 3, 4, 5, 6] for key in keys}
    client, (run,) = runs(home)
    speeds = {p.step: p.value for p in client.get_metric_history(run.info.run_id, "speed")}
    assert speeds == {1: 100, 2: 100, 3: 100, 4: 100, 5: 100, 6: 200}, "a point of the store stays"
    assert (run.info.start_time, run.info.end_time) == tuple(int(1000 * second.facts[k]) for k in ("started", "ended"))
    assert tracking.sync([home / "out"], home, "pupil") == (0, 0, 1)


def test_an_interrupted_record_that_went_on_elsewhere_is_finished_by_sync(home: Path) -> None:
    first = Record(home / "out" / "a", facts())
    epochs(first, 1, 3)
    first.finish({}, {}, "KILLED")
    assert tracking.sync([home / "out"], home, "pupil") == (1, 0, 0)
    second = resumed(home / "out" / "a", first.facts["uid"], first.facts["started"], upto=2)
    epochs(second, 3, 4)
    second.finish({}, {}, "KILLED")  # once more
    assert tracking.sync([home / "out"], home, "pupil") == (0, 1, 0)
    third = resumed(home / "out" / "a", first.facts["uid"], first.facts["started"], upto=4)
    epochs(third, 5, 6)
    (third.artifacts / "table.csv").write_text("a,b\n")
    third.finish({"test/top1": 51.5}, {})
    assert tracking.sync([home / "out"], home, "pupil") == (0, 1, 0)
    assert tracking.sync([home / "out"], home, "pupil") == (0, 0, 1)
    assert {key: len(at) for key, at in steps(home)[1].items()} == {"val/top1": 6, "loss": 6, "test/top1": 1}
    _, (run,) = runs(home)
    assert (run.info.status, run.data.tags["pupil.complete"]) == ("FINISHED", "true")


def test_a_slow_follower_of_a_killed_training_leaves_the_next_one_alone(home: Path) -> None:
    folder, store = home / "out" / "a", tracking.connect(home, "pupil")
    first = Record(folder, facts())
    epochs(first, 1, 2)
    old = tracking.Mirror(folder, store)
    old.push()
    shutil.rmtree(folder)
    second = Record(folder, facts(name="another training"))  # not resumed: its configuration changed
    epochs(second, 1, 4)
    assert not old.push()
    old.abandon()
    client, (run,) = runs(home)
    assert (run.info.run_name, run.info.status) == ("resnet8 by kd", "RUNNING")
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 2, "no point of the other training"


@pytest.mark.slow
def test_a_killed_training_is_shown_as_killed(home: Path) -> None:
    process = train(home, home / "out" / "a", seconds=60)
    try:
        wait_for(lambda: len(runs(home)[1]) == 1 and steps(home)[1])
        process.kill()
        wait_for(lambda: steps(home)[0] == "KILLED")
    finally:
        process.kill()
        process.communicate()
    assert record.read(home / "out" / "a")["status"] == "RUNNING"
    assert tracking.sync([home / "out"], home, "pupil") == (0, 0, 0), "a record that may go on is left alone"


def wait_for(fact: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.2)


class Cut(BaseException):
    """What SIGKILL looks like to those who come after it: nothing is tidied up."""


def test_a_push_cut_off_at_any_request_is_completed_by_the_next(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    store = tracking.connect(home, "pupil")
    done = finished(home / "out" / "a", uid="x0")
    writes = ("create_run", "set_tag", "set_terminated", "log_batch", "log_inputs", "log_artifacts", "log_artifact")
    left = [10**6]

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(MlflowClient, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:  # asked, and no answer seen: every second time it was carried out
                if number % 2:
                    real(*args, **kwargs)
                raise Cut
            return real(*args, **kwargs)

        return call

    for name in writes:
        monkeypatch.setattr(MlflowClient, name, counted(name))
    for number in range(1, 100):
        done.facts["uid"] = f"x{number}"
        done.write()
        left[0] = number
        try:
            tracking.Mirror(done.folder, store).push()
            break
        except Cut:
            left[0] = 10**6
        assert tracking.sync([home / "out"], home, "pupil")[2] == 0
        assert tracking.sync([home / "out"], home, "pupil") == (0, 0, 1)
        assert_mirrored(home, done)
    assert number > 8, "so many requests write"  # type: ignore[possibly-undefined]


SYNC = """
import os, signal, sys
from pathlib import Path
from mlflow import MlflowClient
from pupil import tracking
home, number = Path(sys.argv[1]), int(sys.argv[2])
real, calls = MlflowClient.log_batch, [0]
def log_batch(*args, **kwargs):
    calls[0] += 1
    if calls[0] == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
MlflowClient.log_batch = log_batch
print(tracking.sync([home / "out"], home, "pupil"))
"""


@pytest.mark.slow
def test_a_sync_that_is_killed_is_repeated_without_doubles(home: Path) -> None:
    records = [finished(home / "out" / name) for name in "abc"]
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    for number in (3, 6):  # in the first record, then in the next one
        done = subprocess.run([sys.executable, "-c", SYNC, str(home), str(number)], env=env, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
    created, completed, present = tracking.sync([home / "out"], home, "pupil")
    assert created + completed + present == 3
    assert present < 3
    assert tracking.sync([home / "out"], home, "pupil") == (0, 0, 3)
    for one in records:
        assert_mirrored(home, one)


@pytest.mark.slow
def test_a_sync_while_trainings_write_and_end_adds_nothing_twice(home: Path) -> None:
    finished(home / "out" / "old")
    processes = [train(home, home / "out" / str(i), seconds=8) for i in range(2)]
    counts = []
    while any(process.poll() is None for process in processes):
        counts.append(tracking.sync([home / "out"], home, "pupil"))
    for process in processes:
        out, err = process.communicate()
        assert (process.returncode, err) == (0, ""), out
    assert counts[0][0] == 1
    assert len(counts) > 3
    assert tracking.sync([home / "out"], home, "pupil") == (0, 0, 3)
    client, found = runs(home)
    assert len(found) == 3
    for run in found:
        for key in run.data.metrics:
            at = [p.step for p in client.get_metric_history(run.info.run_id, key)]
            assert len(set(at)) == len(at), key
        assert run.info.status == "FINISHED"
    assert len([run for run in found if len(client.get_metric_history(run.info.run_id, "loss")) == 20]) == 2


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty record": lambda f: (f / "record.json").write_text(""),
    "cut record": lambda f: (f / "record.json").write_bytes((f / "record.json").read_bytes()[:300]),
    "flipped bit": lambda f: flip(f / "record.json", b'"lr": 0.1', b'"lr": 0.3'),
    "not text": lambda f: (f / "record.json").write_bytes(bytes(range(256))),
    "a list": lambda f: (f / "record.json").write_text("[1, 2]"),
    "nothing in it": lambda f: (f / "record.json").write_text("{}"),
    "deep": lambda f: (f / "record.json").write_text("[" * 200_000),
    "a path for a name": lambda f: (f / "record.json").write_text(
        json.dumps({"uid": "../../x", "status": "FINISHED", "stage": "a", "name": "b", "params": {}, "started": 1})
    ),
    "a folder": lambda f: ((f / "record.json").unlink(), (f / "record.json").mkdir()),
    "cut metrics": lambda f: (f / "metrics.jsonl").write_bytes((f / "metrics.jsonl").read_bytes()[:-9]),
    "flipped metrics": lambda f: flip(f / "metrics.jsonl", b'"step": 2', b'"step": 3'),
    "no metrics": lambda f: (f / "metrics.jsonl").unlink(),
}


def flip(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def test_damaged_records_are_named_in_a_line_each_and_the_others_synced(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, damage in DAMAGE.items():
        finished(home / "out" / name)
        damage(home / "out" / name)
    finished(home / "out" / "whole")
    old = finished(home / "out" / "without checksums")  # of an earlier version
    content = {key: value for key, value in old.facts.items() if key != "metrics_sha256"}
    (old.folder / "record.json").write_text(json.dumps(content))
    assert tracking.sync([home / "out"], home, "pupil") == (2, 0, 0)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == len(DAMAGE)
    for name in DAMAGE:
        (line,) = [line for line in lines if f"out/{name} skipped" in line]
        assert name == "a folder" or f"{name}/record.json is damaged" in line or f"{name}/metrics.jsonl is damaged" in line
    assert len(runs(home)[1]) == 2


def test_a_damaged_line_of_an_old_record_is_named(home: Path) -> None:
    old = finished(home / "out" / "a")
    for line in (b"{", b"[]", b'{"step": "1"}', b'{"step": 1, "time": null, "values": {}}', b"\xff\xfe"):
        (old.folder / "metrics.jsonl").write_bytes(b'{"step": 1, "time": 1.5, "values": {}}\n' + line + b"\n")
        with pytest.raises(UserError, match=r"metrics.jsonl is damaged: line 2 is not one of metrics"):
            record.read_metrics(old.folder)


def test_twins_that_repeated_requests_left_become_one_run(home: Path) -> None:
    done = finished(home / "out" / "a")
    store = tracking.connect(home, "pupil")
    started, tags = int(1000 * done.facts["started"]), {"pupil.record": done.facts["uid"]}

    def twin() -> str:
        return store.client.create_run(store.experiment, started, tags, done.facts["name"]).info.run_id

    twins = [twin(), twin()]
    assert tracking.sync([home / "out"], home, "pupil") == (0, 1, 0)
    late = twin()  # of a request that was answered after all
    assert tracking.sync([home / "out"], home, "pupil") == (0, 1, 0)
    assert tracking.sync([home / "out"], home, "pupil") == (0, 0, 1)
    (kept,) = runs(home)[1]
    assert kept.info.run_id in twins
    assert (kept.info.status, len(store.client.get_metric_history(kept.info.run_id, "loss"))) == ("FINISHED", 3)
    left = store.client.search_runs([store.experiment])
    assert [run.info.run_id for run in left] == [kept.info.run_id], "in no list of runs"
    assert late != kept.info.run_id
