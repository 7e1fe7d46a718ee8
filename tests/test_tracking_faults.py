"""What can go wrong with a tracking store while a training runs: the training ends well, a later sync makes up for it."""

import json
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pupil import checkpoint, models, record, tracking
from pupil.record import Record
from pupil.tracking import follow
from pupil.types import UserError
from tests.tracked import assert_mirrored, epochs, facts, finished, runs, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:::(mlflow|pydantic|sqlalchemy|alembic|google).*"),
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning"),  # sqlite connections that MLflow keeps until the end
]


class Server:
    """MLflow's server, with faults; see faulty_server.py."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.fault()
        self.start()

    def fault(self, **fault: Any) -> None:
        new = self.folder / "fault.new"
        new.write_text(json.dumps(fault))
        new.replace(self.folder / "fault.json")

    def start(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("faulty_server.py")), str(self.port), str(self.folder)]
        with open(self.folder / "log", "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_for(self.listens)

    def listens(self) -> bool:
        assert self.process.poll() is None, (self.folder / "log").read_text()
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_store, folder / "mlflow.db")
    server = Server(folder)
    yield server
    server.kill()


@pytest.fixture
def server(shared_server: Server, home: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Healthy, and the store of this process."""
    shared_server.fault()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", shared_server.uri)
    return shared_server


def wait_for(fact: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def streamed(home: Path, uid: str) -> int:
    """Points of a metric in the store."""
    client, found = runs(home)
    (run,) = [run for run in found if run.data.tags["pupil.record"] == uid] or [None]
    return len(client.get_metric_history(run.info.run_id, "loss")) if run else 0


def uid_of(folder: Path) -> str:
    wait_for((folder / "record.json").exists)
    return record.read(folder)["uid"]


def complete(home: Path, folder: Path) -> None:
    """Every point of the record of `train` is there, once."""
    client, found = runs(home)
    facts = record.read(folder)
    (run,) = [run for run in found if run.data.tags["pupil.record"] == facts["uid"]]
    assert (run.info.status, run.data.tags["pupil.complete"], run.data.params) == ("FINISHED", "true", {"lr": "0.1"})
    for key in ("loss", "val/top1"):
        assert [p.step for p in client.get_metric_history(run.info.run_id, key)] == list(range(1, 21)), key
    assert len(client.get_metric_history(run.info.run_id, "test/top1")) == 1
    assert "record.json" in {f.path for f in client.list_artifacts(run.info.run_id)}


def ended_well(process: subprocess.Popen[str], seconds: float) -> str:
    """What a training said that ended with status 0, having waited no longer than so for its tracking."""
    out, err = process.communicate(timeout=seconds + 120)
    assert process.returncode == 0, err
    assert float(out.split()[1]) < seconds, err
    assert len(err.splitlines()) <= 2, err
    assert "Traceback" not in err
    return err


@pytest.mark.slow
@pytest.mark.parametrize("end", ["dies", "hangs", "errors"])
def test_a_server_that_fails_midway_costs_seconds(home: Path, server: Server, end: str) -> None:
    folder = home / "out" / "a"
    process = train(home, folder, seconds=4, halt=home / "go on")
    try:
        uid = uid_of(folder)
        wait_for(lambda: streamed(home, uid) > 2)
        match end:
            case "dies":
                server.kill()
            case "hangs":
                server.fault(hang=True)
            case "errors":
                server.fault(error=True)
        (home / "go on").touch()
        err = ended_well(process, seconds=60)
    finally:
        process.kill()
        server.fault()
        if end == "dies":
            server.start()
    assert "sync` later" in err
    assert end == "hangs" or streamed(home, uid) <= 10  # a server that hung does late what it was asked
    assert tracking.sync([home / "out"], home, "pupil") == (0, 1, 0)
    assert tracking.sync([home / "out"], home, "pupil") == (0, 0, 1)
    complete(home, folder)


@pytest.mark.slow
def test_a_slow_server_gets_everything_in_the_end(home: Path, server: Server) -> None:
    server.fault(slow=0.3)
    process = train(home, home / "out" / "a", seconds=4)
    assert ended_well(process, seconds=60) == ""
    server.fault()
    complete(home, home / "out" / "a")
    assert tracking.sync([home / "out"], home, "pupil") == (0, 0, 1)


def model_folder(path: Path) -> None:
    torch.manual_seed(0)
    meta = {"network": "resnet8", "method": None, "surgery": {}, "classes": list("abc"), "image_size": 16, "role": "student"}
    checkpoint.save(path, models.build("resnet8", 3).state_dict(), {**meta, "mean": [0.5] * 3, "std": [0.2] * 3})


@pytest.mark.slow
@pytest.mark.parametrize("part", ["runs/create", "runs/log-batch", "logged-models"])
def test_answers_that_come_too_late_double_nothing(home: Path, server: Server, part: str) -> None:
    """The server does what it is asked and answers after the client has given up and asked again."""
    model_folder(home / "out" / "model")
    done = finished(home / "out" / "a", model="../model")
    server.fault(late=[part, 7])  # seconds; the client waits 5, twice
    with pytest.raises(UserError, match="cannot be used"):
        tracking.sync([home / "out"], home, "pupil")
    time.sleep(10)  # until the server has done everything
    server.fault()
    assert tracking.sync([home / "out"], home, "pupil")[:2] in ((1, 0), (0, 1))
    assert tracking.sync([home / "out"], home, "pupil") == (0, 0, 1)
    run = assert_mirrored(home, done)
    (output,) = run.outputs.model_outputs
    client = runs(home)[0]
    found = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    assert [(model.model_id, model.status) for model in found] == [(output.model_id, "READY")]
    every = client.search_runs([run.info.experiment_id], f"attributes.run_name = '{run.info.run_name}'")
    assert len([run for run in every if run.data.tags.get("pupil.record", done.facts["uid"]) == done.facts["uid"]]) == 1
    assert len(client.search_runs([run.info.experiment_id], "tags.`pupil.pipeline` = 'pipe-1'")) == 1


@pytest.mark.slow
def test_a_value_that_a_server_refuses_costs_that_value_alone(
    home: Path, server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    done = finished(home / "out" / "a")
    folder = home / "trained" / "b"
    server.fault(refuse='"p77"')
    assert tracking.sync([home / "out"], home, "pupil") == (1, 0, 0)
    (line,) = capfd.readouterr().err.splitlines()
    assert "the store refuses p77 = 77: " in line
    assert "not in this house; the rest is there" in line
    client, found = runs(home)
    (run,) = [run for run in found if run.data.tags["pupil.record"] == done.facts["uid"]]
    assert set(done.facts["params"]) - set(run.data.params) == {"p77"}
    assert (run.info.status, len(client.get_metric_history(run.info.run_id, "loss"))) == ("FINISHED", 3)
    server.fault(refuse='"val/top1"')
    err = ended_well(train(home, folder, seconds=2), seconds=45)
    assert "the store refuses val/top1 = 1" in err
    server.fault()
    assert tracking.sync([home / "out", home / "trained"], home, "pupil") == (0, 2, 0)
    assert tracking.sync([home / "out", home / "trained"], home, "pupil") == (0, 0, 2)
    assert_mirrored(home, done)
    complete(home, folder)


def test_a_store_that_comes_back_gets_the_rest_from_the_same_follower(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setattr(follow, "AGAIN", 0.1)
    real, down = MlflowClient.log_batch, threading.Event()

    def log_batch(*args: Any, **kwargs: Any) -> Any:
        if down.is_set():
            raise OSError("no space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    result: list[bool] = []
    follower = follow.Follower(home, "pupil", lambda number, complete: result.append(complete))
    thread = threading.Thread(target=follower.follow)
    thread.start()
    follower.hear("open", 0, str(home / "a"))
    done = Record(home / "a", facts(), lambda: follower.hear("grew", 0))
    epochs(done, 1, 2)
    wait_for(lambda: runs(home)[1] and runs(home)[1][0].data.metrics)
    down.set()
    epochs(done, 3, 4)
    wait_for(lambda: follower.failed)
    down.clear()
    epochs(done, 5, 6)
    wait_for(lambda: len(runs(home)[0].get_metric_history(runs(home)[1][0].info.run_id, "loss")) == 6)
    (done.artifacts / "table.csv").write_text("a,b\n")
    done.finish({"test/top1": 51.5}, {})
    follower.listen([])
    thread.join(60)
    assert result == [True]
    assert_mirrored(home, done)
    (line,) = capfd.readouterr().err.splitlines()
    assert "no space left on device; training goes on" in line


@contextmanager
def disk(path: Path, megabytes: int) -> Iterator[Path]:
    """A disk of its own, where one may be mounted."""
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(path)], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.slow
def test_a_full_disk_under_the_store(home: Path, tmp_path: Path, empty_store: Path) -> None:
    with disk(tmp_path / "disk", 8) as place:
        shutil.copy(empty_store, place / "mlflow.db")
        tracking.connect(place, "pupil")
        with pytest.raises(OSError, match="No space left"):
            (place / "filler").write_bytes(bytes(8 << 20))
        err = ended_well(train(place, home / "out" / "a"), seconds=45)
        assert "full" in err or "No space left" in err
        for _ in range(2):  # the record is sound, the store is not
            with pytest.raises(UserError, match=r"the tracking store .* cannot be used: .*(full|No space)") as caught:
                tracking.sync([home / "out"], place, "pupil")
            assert "\n" not in str(caught.value)
        (place / "filler").unlink()
        assert sum(tracking.sync([home / "out"], place, "pupil")[:2]) == 1
        assert tracking.sync([home / "out"], place, "pupil") == (0, 0, 1)
        complete(place, home / "out" / "a")


@pytest.mark.slow
def test_a_store_that_cannot_be_written_to_its_end(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without mounting: the training's processes can write no file beyond half the size of the database."""
    tracking.connect(home, "pupil")
    limit = (home / "mlflow.db").stat().st_size // 2
    popen = subprocess.Popen
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", lambda *a, **k: popen(*a, preexec_fn=lambda: capped(limit), **k))
        process = train(home, home / "out" / "a", seconds=2)
    err = ended_well(process, seconds=45)
    assert "WARNING tracking is off" in err
    assert "sync` later" in err
    assert sum(tracking.sync([home / "out"], home, "pupil")[:2]) == 1
    assert tracking.sync([home / "out"], home, "pupil") == (0, 0, 1)
    complete(home, home / "out" / "a")


def capped(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.slow
def test_a_store_on_a_read_only_disk(home: Path, tmp_path: Path, empty_store: Path) -> None:
    with disk(tmp_path / "disk", 8) as place:
        shutil.copy(empty_store, place / "mlflow.db")
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        err = ended_well(train(place, home / "out" / "a"), seconds=45)
        assert "Read-only file system" in err
        with pytest.raises(UserError, match=r"cannot be used: .*Read-only file system"):
            tracking.sync([home / "out"], place, "pupil")
        subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
        assert tracking.sync([home / "out"], place, "pupil") == (1, 0, 0)
        assert tracking.sync([home / "out"], place, "pupil") == (0, 0, 1)
        complete(place, home / "out" / "a")


@pytest.mark.slow
def test_a_database_that_is_opened_for_reading_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking.connect(home, "pupil")
    uri = f"sqlite:///file:{home / 'mlflow.db'}?mode=ro&uri=true"
    err = ended_well(train(home, home / "out" / "a", MLFLOW_TRACKING_URI=uri), seconds=45)
    assert "readonly database" in err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=r"cannot be used: .*readonly database"):
        tracking.sync([home / "out"], home, "pupil")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.sync([home / "out"], home, "pupil") == (1, 0, 0)
    assert tracking.sync([home / "out"], home, "pupil") == (0, 0, 1)
    complete(home, home / "out" / "a")


def test_a_clock_that_goes_back_disorders_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, shift = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + shift[0])
    done = Record(home / "out" / "a", facts())
    epochs(done, 1, 2)
    shift[0] = -3600.0
    time.sleep(0.05)
    epochs(done, 3, 4)
    done.finish({"test/top1": 51.5}, {})
    first = done.facts
    (done.artifacts / "table.csv").write_text("a,b\n")
    times = [first["started"], *(line["time"] for line in record.read_metrics(done.folder)), first["ended"]]
    assert times == sorted(times)
    assert 0.05 < first["ended"] - first["started"] < 60, "the duration that it was"
    shift[0] = -7200.0
    lines = (done.folder / "metrics.jsonl").read_text()
    shutil.rmtree(done.folder)
    known = {"uid": first["uid"], "started": first["started"]}
    again = Record(done.folder, facts(**known), lines=lines)  # goes on, the clock still further behind
    epochs(again, 5, 6)
    (again.artifacts / "table.csv").write_text("a,b\n")
    again.finish({"test/top1": 51.5}, {})
    times = [again.facts["started"], *(line["time"] for line in record.read_metrics(done.folder)), again.facts["ended"]]
    assert times == sorted(times)
    assert times[-1] - times[0] < 60
    assert tracking.sync([home / "out"], home, "pupil") == (1, 0, 0)
    run = assert_mirrored(home, again)
    assert run.info.start_time <= run.info.end_time
    points = runs(home)[0].get_metric_history(run.info.run_id, "loss")
    assert [p.step for p in sorted(points, key=lambda p: (p.timestamp, p.step))] == [1, 2, 3, 4, 5, 6]


def test_a_clock_that_jumps_ahead_and_back_goes_on_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    wall, ticks = [1000.0], [5.0]
    monkeypatch.setattr(time, "time", lambda: wall[0])
    monkeypatch.setattr(time, "monotonic", lambda: ticks[0])
    clock = record.Clock(0.0)
    seen = []
    for new, passed in ((1000.0, 0), (1010.0, 10), (500.0, 10), (500.0, 10), (2000.0, 10), (2010.0, 10)):
        wall[0], ticks[0] = new, ticks[0] + passed
        seen.append(clock.now())
    assert seen == [1000.0, 1010.0, 1020.0, 1030.0, 2000.0, 2010.0]
