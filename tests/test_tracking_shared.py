"""Many records of one process on their way to the store: one other process takes them there."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pupil import assemble, checkpoint, config, opening, record, session, tracking
from pupil import settings as settings_of
from pupil.data import prepare
from pupil.record import Record
from pupil.tracking import follow
from pupil.tracking.child import Child
from tests.tracked import SRC, assert_mirrored, epochs, facts, runs

pytestmark = [
    pytest.mark.filterwarnings("ignore:::(mlflow|pydantic|sqlalchemy|alembic|google).*"),
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning"),  # sqlite connections that MLflow keeps until the end
]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Child]:
    """Every process that is started to follow."""
    found: list[Child] = []
    real = Child.__init__

    def counted(self: Child, home: Path, experiment: str) -> None:
        real(self, home, experiment)
        found.append(self)

    monkeypatch.setattr(Child, "__init__", counted)
    return found


def wait_for(fact: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def streamed(home: Path, name: str) -> tuple[tracking.Stream, Record]:
    stream = tracking.Stream(home / "out" / name, home, "pupil")
    return stream, Record(home / "out" / name, facts(name=name), stream.changed)


def finish(done: Record) -> None:
    (done.artifacts / "table.csv").write_text("a,b\n")
    done.finish({"test/top1": 51.5}, {})


def steps(home: Path) -> dict[str, list[int]]:
    """Of the loss, by the name of the run."""
    client, found = runs(home)
    return {run.info.run_name: [p.step for p in client.get_metric_history(run.info.run_id, "loss")] for run in found}


def test_a_table_has_one_follower_and_every_run(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[Child], capfd: pytest.CaptureFixture[str]
) -> None:
    """Of 3 students and 2 seeds, in the group of the pipeline."""
    for module in (session, opening):
        monkeypatch.setattr(module, "HOME", home)
    monkeypatch.setenv("DVC_STAGE", "table")
    monkeypatch.setattr(opening, "pipeline_key", lambda: "pipe-1")
    optim = {"epochs": 2, "batch_size": 16, "lr": 0.02, "schedule": "cosine"}
    places = {"prepared": str(tmp_path / "data"), "out": str(tmp_path / "model"), "record": str(tmp_path / "record")}
    page: dict[str, Any] = {"teachers": ["resnet14"], "device": "cpu", "optim": optim, "teacher": {"optim": optim}, **places}
    page |= {"methods": ["kd", "at", "sp"], "seeds": [0, 1]}
    page["distill"] = {"checkpoint": str(tmp_path / "teacher"), "student": "resnet8"}
    page["data"] = {"train_images": 40, "val_images": 10, "test_images": 20, "image_size": 16, "pad": 2}
    settings = config.resolve(settings_of.overlay(settings_of.defaults(), page))
    prepare(settings.data, tmp_path / "data")
    data = assemble.prepared(settings)
    job = assemble.single(dataclasses.replace(settings, train=settings_of.Train(role="teacher")), data)
    meta = {**job.meta, **{key: data.manifest[key] for key in ("classes", "image_size", "mean", "std")}}
    checkpoint.save(tmp_path / "teacher", job.method.student.state_dict(), meta)
    session.run(assemble.table(settings, data), data, settings)
    (child,) = started
    assert child.returncode == 0, "all complete"
    assert "tracking" not in capfd.readouterr().err
    client, found = runs(home)
    folders = record.find([tmp_path / "record"])
    assert len(found) == len(folders) == 6
    by_uid = {run.data.tags["pupil.record"]: run for run in found}
    for folder in folders:
        known, lines = record.read(folder), record.read_metrics(folder)
        run = by_uid[known["uid"]]
        assert (run.info.status, run.data.tags["pupil.complete"], run.info.run_name) == ("FINISHED", "true", known["name"])
        history = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
        for key in lines[0]["values"]:
            assert [(p.step, p.value) for p in history[key]] == [(line["step"], line["values"][key]) for line in lines], key
        for key, value in known["final"].items():
            assert [p.value for p in history[key]] == [value], key
        assert set(history) == set(lines[0]["values"]) | set(known["final"])
        assert {"record.json", "config.json"} <= {f.path for f in client.list_artifacts(run.info.run_id)}
        assert len(run.outputs.model_outputs) == 1
    (parent,) = {run.data.tags["mlflow.parentRunId"] for run in found}
    assert client.get_run(parent).data.tags["pupil.pipeline"] == "pipe-1"
    assert tracking.sync([tmp_path / "record"], home, "pupil") == (0, 0, 6)


def test_streams_share_a_process_until_the_last_one_is_closed(home: Path, started: list[Child]) -> None:
    pairs = [streamed(home, name) for name in "ab"]
    for stream, done in pairs:
        epochs(done, 1, 3)
        finish(done)
        stream.close()
    assert [child.returncode for child in started] == [0]
    with tracking.kept(home, "pupil"):
        for name in "cd":  # one after the other
            stream, done = streamed(home, name)
            pairs.append((stream, done))
            epochs(done, 1, 3)
            finish(done)
            stream.close()
            assert (len(started), started[1].poll()) == (2, None)
    assert started[1].returncode == 0
    for _, done in pairs:
        assert_mirrored(home, done)


def test_a_damaged_record_stops_no_other(home: Path, started: list[Child], capfd: pytest.CaptureFixture[str]) -> None:
    (bad, damaged), (good, done) = (streamed(home, name) for name in "ab")
    epochs(damaged, 1, 3)
    (damaged.folder / "record.json").write_text("{broken")
    damaged.changed()
    epochs(done, 1, 3)
    bad.close()
    finish(done)
    good.close()
    assert [child.returncode for child in started] == [follow.INCOMPLETE]
    first, second = capfd.readouterr().err.splitlines()
    assert "WARNING tracking is off: " in first
    assert "out/a/record.json is damaged" in first
    assert second == f"tracking: {bad.folder} is not complete in the store; run `python -m pupil sync` later"
    assert_mirrored(home, done)


def test_a_follower_that_is_killed_costs_a_line_for_each_record(
    home: Path, started: list[Child], capfd: pytest.CaptureFixture[str]
) -> None:
    pairs = [streamed(home, name) for name in "ab"]
    for _, done in pairs:
        epochs(done, 1, 3)
    wait_for(lambda: len(runs(home)[1]) == 2)
    started[0].kill()
    started[0].wait()
    pairs.append(streamed(home, "c"))  # it gets a new one
    for stream, done in pairs:
        epochs(done, 4, 5)
        finish(done)
        stream.close()
    said = capfd.readouterr().err.splitlines()
    assert said == [
        f"tracking: {stream.folder} is not complete in the store; run `python -m pupil sync` later" for stream, _ in pairs[:2]
    ]
    assert [child.returncode for child in started] == [-signal.SIGKILL, 0]
    assert tracking.sync([home / "out"], home, "pupil") == (0, 2, 1)
    for _, done in pairs[:2]:
        assert_mirrored(home, done)


WRITER = """
import os, sys, time
from pathlib import Path
from pupil import tracking
from pupil.record import Record
home = Path(sys.argv[1])
records = []
for name in "abc":
    stream = tracking.Stream(home / "out" / name, home, "pupil")
    records.append((stream, Record(home / "out" / name, {"stage": "train", "name": name, "params": {}}, stream.changed)))
if not (worker := os.fork()):  # as one that makes batches
    records[0][1].log({"loss": 0.0}, 1000)
    time.sleep(600)
for step in range(1, 21):
    for _, record in records:
        record.log({"loss": 1 / step}, step)
    time.sleep(0.01)
print(worker, records[0][0].child.pid, flush=True)
time.sleep(600)
"""


def test_a_killed_writer_leaves_every_run_as_far_as_its_record(home: Path) -> None:
    """Though a process that it forked lives on."""
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(home)], env=env, stdout=subprocess.PIPE, text=True)
    assert writer.stdout
    worker, follower = map(int, writer.stdout.readline().split())
    try:
        writer.kill()
        writer.wait()
        wait_for(lambda: [run.info.status for run in runs(home)[1]] == ["KILLED"] * 3)
        os.kill(worker, 0)
    finally:
        os.kill(worker, signal.SIGKILL)
        writer.stdout.close()
    wait_for(lambda: not Path(f"/proc/{follower}").exists() or " Z " in Path(f"/proc/{follower}/stat").read_text())
    client, found = runs(home)
    for run in found:
        lines = record.read_metrics(home / "out" / run.info.run_name)
        points = client.get_metric_history(run.info.run_id, "loss")
        assert sorted(p.step for p in points) == sorted(line["step"] for line in lines)
        assert len(points) >= 20


def test_a_follower_that_does_not_read_holds_up_no_training(home: Path, started: list[Child]) -> None:
    stream, done = streamed(home, "a")
    started[0].send_signal(signal.SIGSTOP)
    start = time.monotonic()
    for _ in range(20_000):  # more than a pipe holds
        stream.changed()
    assert time.monotonic() - start < 20
    started[0].send_signal(signal.SIGCONT)
    epochs(done, 1, 3)
    finish(done)
    wait_for(lambda: streamed_completely(home))
    stream.close()
    assert started[0].returncode == 0


def streamed_completely(home: Path) -> bool:
    return [run.data.tags.get("pupil.complete") for run in runs(home)[1]] == ["true"]


# --- in this process: its turns, its patience -----------------------------------------------------------------------------


class Following:
    """A follower in threads of this process, and what it answers."""

    def __init__(self, home: Path) -> None:
        self.home, self.answers = home, {}
        self.follower = follow.Follower(home, "pupil", self.answers.__setitem__)
        self.thread = threading.Thread(target=self.follower.follow)
        self.thread.start()

    def open(self, number: int) -> Record:
        folder = self.home / "out" / str(number)
        self.follower.hear("open", number, str(folder))
        return Record(folder, facts(name=str(number)), lambda: self.follower.hear("grew", number))

    def end(self, number: int) -> None:
        self.follower.hear("end", number)


@pytest.fixture
def following(home: Path) -> Iterator[Following]:
    found = Following(home)
    yield found
    found.follower.listen([])
    found.thread.join(60)
    assert not found.thread.is_alive()


@contextmanager
def held_up(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[threading.Event]:
    """MlflowClient's method waits in here, the first time; set, it has begun."""
    from mlflow import MlflowClient

    begun, over, real = threading.Event(), threading.Event(), getattr(MlflowClient, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if not begun.is_set():
            begun.set()
            over.wait(60)
        return real(*args, **kwargs)

    monkeypatch.setattr(MlflowClient, name, call)
    yield begun
    over.set()


def test_an_upload_that_takes_for_ever_costs_its_patience_and_no_other_record(
    home: Path, following: Following, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, other = following.open(0), following.open(1)
    epochs(slow, 1, 3)
    epochs(other, 1, 2)
    wait_for(lambda: len(runs(home)[1]) == 2)
    monkeypatch.setattr(follow, "PATIENCE", 3.0)
    with held_up(monkeypatch, "log_artifacts") as begun:
        finish(slow)
        following.end(0)
        assert begun.wait(60)
        epochs(other, 3, 4)
        wait_for(lambda: following.answers)
        assert following.answers == {0: False}
        wait_for(lambda: steps(home)["1"] == [1, 2, 3, 4])
        finish(other)
        following.end(1)
        wait_for(lambda: len(following.answers) == 2)
        assert following.answers == {0: False, 1: True}
    assert_mirrored(home, other)


@pytest.mark.parametrize("code", ["INVALID_PARAMETER_VALUE", "INTERNAL_ERROR"])
def test_a_record_that_the_store_refuses_stops_no_other(
    home: Path, following: Following, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], code: str
) -> None:
    from mlflow import MlflowClient, MlflowException
    from mlflow.protos import databricks_pb2

    real = MlflowClient.log_batch

    def log_batch(self: MlflowClient, run: str, metrics: Any, params: Any) -> None:
        if any(p.key == "bad" for p in metrics):
            raise MlflowException("not in this house", databricks_pb2.ErrorCode.Value(code))
        real(self, run, metrics, params)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    refused, good = following.open(0), following.open(1)
    epochs(refused, 1, 3, bad=1.0)
    epochs(good, 1, 3)
    finish(refused)
    following.end(0)
    wait_for(lambda: 0 in following.answers)
    finish(good)
    following.end(1)
    wait_for(lambda: 1 in following.answers)
    assert following.answers == {0: False, 1: True}
    assert_mirrored(home, good)
    (line,) = capfd.readouterr().err.splitlines()
    assert "not in this house" in line
    monkeypatch.setattr(MlflowClient, "log_batch", real)
    assert tracking.sync([home / "out"], home, "pupil") == (0, 1, 1)
    assert_mirrored(home, refused)


def test_a_store_that_is_down_is_asked_once_for_all(
    home: Path, following: Following, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(follow, "AGAIN", 4.0)
    real, asked, down = follow.connect, [], [True]

    def connect(*about: Any) -> Any:
        asked.append(time.monotonic())
        if down[0]:
            raise OSError("no route to the store")
        return real(*about)

    monkeypatch.setattr(follow, "connect", connect)
    records = [following.open(number) for number in range(6)]
    for one in records:
        epochs(one, 1, 2)
    wait_for(lambda: len(asked) >= 2)
    assert asked[1] - asked[0] >= 4.0
    for number in (0, 1, 2):  # the first of them asks once more, for all that end now
        following.end(number)
    wait_for(lambda: len(following.answers) == 3)
    assert following.answers == dict.fromkeys((0, 1, 2), False)
    assert len(asked) == 3
    down[0] = False
    wait_for(lambda: {name: len(at) for name, at in steps(home).items()} == {"3": 2, "4": 2, "5": 2})
    assert len(asked) == 4
    (line,) = capfd.readouterr().err.splitlines()
    assert "no route to the store" in line


def test_records_are_pushed_in_turn_about_once_a_second(following: Following, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: Counter[str] = Counter()
    real = tracking.Mirror.push

    def push(self: tracking.Mirror) -> bool:
        pushed[self.folder.name] += 1
        time.sleep(0.1)
        return real(self)

    monkeypatch.setattr(tracking.Mirror, "push", push)
    records = [following.open(number) for number in range(5)]
    epochs(records[4], 1, 1)
    wait_for(lambda: pushed["4"])
    pushed.clear()
    start = time.monotonic()
    step = 2
    while time.monotonic() < start + 8:
        for one in records:
            epochs(one, step, step)
        step += 1
        time.sleep(0.02)
    most = time.monotonic() - start + 1
    assert all(pushed[str(number)] <= most for number in range(5)), pushed
    assert max(pushed.values()) - min(pushed.values()) <= 1, pushed
    assert min(pushed.values()) >= 2, pushed


def test_what_a_dying_writer_left_unsaid_is_no_fault(home: Path) -> None:
    answers: dict[int, bool] = {}
    follower = follow.Follower(home, "pupil", answers.__setitem__)
    thread = threading.Thread(target=follower.follow)
    thread.start()
    Record(home / "a", facts())
    folder = str(home / "a").encode()
    follower.listen([b'["open", 7, "' + folder + b'"]\n', b'["grew", 9]\n', b"\xff\n", b"3\n", b'["open", 8, "/a fol'])
    thread.join(60)
    assert answers == {7: False}
    ((run,),) = [runs(home)[1]]
    assert run.info.status == "KILLED"


def test_a_store_that_never_answers_costs_its_patience_once(
    home: Path, following: Following, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "PATIENCE_UNANSWERED", 2.0)
    monkeypatch.setattr(follow, "address", lambda home: ("http://nowhere", True))
    over = threading.Event()

    def connect(*about: Any) -> Any:
        over.wait(60)
        raise OSError("timed out")

    monkeypatch.setattr(follow, "connect", connect)
    for number in range(5):
        epochs(following.open(number), 1, 2)
    start = time.monotonic()
    for number in range(4):
        following.end(number)
        wait_for(lambda: number in following.answers)  # noqa: B023
    assert following.answers == dict.fromkeys(range(4), False)
    assert 2.0 <= time.monotonic() - start < 6.0  # not that for each
    over.set()
