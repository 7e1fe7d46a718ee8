"""Records and MLflow: a real store, sqlite in a temporary folder."""

import os
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from pupil import checkpoint, models, tracking
from pupil.record import Record
from pupil.types import UserError
from tests.tracked import assert_mirrored, epochs, facts, finished, runs, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:::(mlflow|pydantic|sqlalchemy|alembic|google).*"),
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning"),  # sqlite connections that MLflow keeps until the end
]


def test_a_streamed_run_equals_its_record(home: Path) -> None:
    stream = tracking.Stream(home / "record", home, "pupil")
    record = Record(home / "record", facts(), stream.changed)
    epochs(record, 1, 2)
    deadline = time.monotonic() + 60
    while not (client_runs := runs(home))[1]:  # it is there while the training goes on
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert client_runs[1][0].info.status == "RUNNING"
    epochs(record, 3, 5)
    (record.artifacts / "table.csv").write_text("a,b\n")
    record.finish({"test/top1": 51.5}, {})
    stream.close()
    assert stream.child is not None
    assert stream.child.returncode == 0, "complete"
    run = assert_mirrored(home, record)
    parent = runs(home)[0].get_run(run.data.tags["mlflow.parentRunId"])
    assert (parent.info.run_name, parent.info.status, parent.data.tags["pupil.pipeline"]) == ("pipeline", "FINISHED", "pipe-1")
    assert (home / "mlruns").is_dir()
    assert tracking.sync([home / "record"], home, "pupil") == (0, 0, 1)


def test_sync_creates_the_run_of_a_record_once(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    record = finished(home / "out" / "a")
    Record(home / "out" / "b", facts())  # still running: left alone
    (home / "out" / "c").mkdir()
    (home / "out" / "c" / "record.json").write_text("{broken")
    assert tracking.sync([home / "out"], home, "pupil") == (1, 0, 0)
    err = capfd.readouterr().err.splitlines()
    assert len(err) == 1
    assert "out/c skipped" in err[0]
    assert_mirrored(home, record)
    database = (home / "mlflow.db").read_bytes()
    assert tracking.sync([home / "out"], home, "pupil") == (0, 0, 1)
    assert (home / "mlflow.db").read_bytes() == database
    assert len(runs(home)[1]) == 1


def test_a_failed_run_is_shown_as_failed(home: Path) -> None:
    record = finished(home / "out" / "a", "FAILED", model="../model")  # which was never written
    assert tracking.sync([home / "out"], home, "pupil") == (1, 0, 0)
    assert_mirrored(home, record)


def test_sync_leaves_a_deleted_run_deleted(home: Path) -> None:
    finished(home / "out" / "a")
    tracking.sync([home / "out"], home, "pupil")
    client, (run,) = runs(home)
    client.delete_run(run.info.run_id)
    assert tracking.sync([home / "out"], home, "pupil") == (0, 0, 1)


def test_a_stream_that_died_midway_is_completed_without_doubles(home: Path) -> None:
    record = Record(home / "out" / "a", facts())
    epochs(record, 1, 2)
    mirror = tracking.Mirror(record.folder, tracking.connect(home, "pupil"))
    assert not mirror.push()
    client, (run,) = runs(home)
    client.log_metric(run.info.run_id, "val/top1", 53.0, int(time.time() * 1000), 3)  # half of a push got through
    epochs(record, 3, 4)
    record.finish({"test/top1": 51.5, "val/top1": 54.0}, {})
    client.log_metric(run.info.run_id, "test/top1", 51.5, int(record.facts["ended"] * 1000), 4)
    (record.artifacts / "table.csv").write_text("a,b\n")
    assert tracking.sync([home / "out"], home, "pupil") == (0, 1, 0)
    _, (again,) = runs(home)
    assert again.info.run_id == run.info.run_id
    history = {key: client.get_metric_history(run.info.run_id, key) for key in ("val/top1", "loss", "test/top1")}
    assert sorted(p.step for p in history["val/top1"]) == [1, 2, 3, 4]
    assert sorted(p.step for p in history["loss"]) == [1, 2, 3, 4]
    assert [p.value for p in history["test/top1"]] == [51.5]
    assert (again.info.status, again.data.tags["pupil.complete"]) == ("FINISHED", "true")
    assert mirror.push()  # the stream was slow, not dead: it adds nothing to what sync wrote
    assert len(client.get_metric_history(run.info.run_id, "val/top1")) == 4


def test_the_run_of_mlflow_run_becomes_the_parent_and_is_not_overwritten(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = tracking.connect(home, "pupil").client
    outer = client.create_run("0", run_name="outer")
    monkeypatch.setenv("MLFLOW_RUN_ID", outer.info.run_id)
    group = tracking.parent_from_environment()
    assert group == {"key": f"mlflow-{outer.info.run_id}", "name": "mlflow run"}
    assert "MLFLOW_RUN_ID" not in os.environ
    assert tracking.parent_from_environment() is None
    monkeypatch.setenv("MLFLOW_RUN_ID", outer.info.run_id)  # even if nobody asked for the parent
    finished(home / "out" / "a", group=group)
    finished(home / "out" / "b", group=group)
    finished(
        home / "out" / "c", group={"key": "mlflow-0123456789abcdef0123456789abcdef", "name": "mlflow run"}
    )  # of another store
    assert tracking.sync([home / "out"], home, "pupil") == (3, 0, 0)
    parents = [run.data.tags["mlflow.parentRunId"] for run in runs(home)[1]]
    assert sorted(parent == outer.info.run_id for parent in parents) == [False, True, True]
    after = client.get_run(outer.info.run_id)
    assert (after.info.run_name, after.info.status, after.data.params, after.data.metrics) == ("outer", "RUNNING", {}, {})


def test_a_deleted_experiment_is_named(home: Path) -> None:
    store = tracking.connect(home, "pupil")
    store.client.delete_experiment(store.experiment)
    with pytest.raises(UserError, match="experiment 'pupil' was deleted"):
        tracking.connect(home, "pupil")


@contextmanager
def dead_server(kind: str) -> Iterator[str]:
    with closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        if kind == "hanging":
            s.listen(50)
        yield f"http://127.0.0.1:{s.getsockname()[1]}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refusing", "hanging"])
def test_a_dead_server_costs_seconds_and_a_later_sync_completes(home: Path, kind: str) -> None:
    with dead_server(kind) as uri:
        process = train(home, home / "out" / "a", MLFLOW_TRACKING_URI=uri)
        out, err = process.communicate(timeout=120)
        exited = time.time()
    assert process.returncode == 0, err
    waited, closed = (float(word) for word in out.split()[1:])
    assert waited < 45, err  # seconds, on a machine that is busy too
    assert exited - closed < 15  # no thread holds the interpreter
    assert "sync` later" in err
    assert len(err.splitlines()) <= 2, err
    assert tracking.sync([home / "out"], home, "pupil") == (1, 0, 0)


def test_sync_says_in_one_line_that_a_server_is_dead(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(home / "out" / "a")
    with dead_server("refusing") as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(UserError, match="cannot be used") as caught:
            tracking.sync([home / "out"], home, "pupil")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_four_processes_on_a_fresh_store_lose_nothing_and_share_one_parent(home: Path) -> None:
    (home / "mlflow.db").unlink()
    processes = [train(home, home / "out" / str(i)) for i in range(4)]
    for process in processes:
        out, err = process.communicate(timeout=180)
        assert (process.returncode, err) == (0, ""), (out, err)
    client, found = runs(home)
    assert len(found) == 4
    assert len({run.data.tags["mlflow.parentRunId"] for run in found}) == 1
    assert len(client.search_runs([found[0].info.experiment_id], "tags.`pupil.pipeline` = 'pipe-1'")) == 1
    for run in found:
        assert run.info.status == "FINISHED"
        assert [p.step for p in client.get_metric_history(run.info.run_id, "loss")] == list(range(1, 21))
    assert tracking.sync([home / "out"], home, "pupil") == (0, 0, 4)
    assert not list((home / ".work").glob("mlflow-*"))


SERVE = """
import sys
import mlflow, numpy as np
model = mlflow.pyfunc.load_model(sys.argv[1])
np.save(sys.argv[3], model.predict(np.load(sys.argv[2])))
"""


def is_pickle(path: Path) -> bool:
    with open(path, "rb") as f:
        head = f.read(2)
    if zipfile.is_zipfile(path):
        return any(name.endswith(".pkl") for name in zipfile.ZipFile(path).namelist())
    return head[:1] == b"\x80" and head[1:] in (b"\x02", b"\x03", b"\x04", b"\x05")


@pytest.mark.slow
def test_the_deployed_model_loads_in_a_fresh_process_and_holds_no_pickle(home: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = models.build("resnet8", 5).eval()
    meta = {"network": "resnet8", "method": None, "surgery": {}, "classes": list("abcde"), "image_size": 32, "role": "student"}
    meta |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3]}
    checkpoint.save(home / "out" / "model", net.state_dict(), meta)
    finished(home / "out" / "record", model="../model")
    start = time.monotonic()
    assert tracking.sync([home / "out"], home, "pupil") == (1, 0, 0)
    took = time.monotonic() - start
    client, (run,) = runs(home)
    (output,) = run.outputs.model_outputs
    logged = client.get_logged_model(output.model_id)
    assert (logged.name, logged.status, logged.source_run_id) == ("student", "READY", run.info.run_id)
    assert {m.key: m.value for m in logged.metrics} == {"test/top1": 51.5}
    files = [path for path in (home / "mlruns").rglob("*") if path.is_file()]
    assert {"MLmodel", "model.safetensors", "model.json", "input_example.json", "serve.py"} <= {path.name for path in files}
    assert not [path for path in files if is_pickle(path) or path.suffix in (".pyc", ".pkl", ".pt", ".pth")]
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    np.save(tmp_path / "x.npy", pixels.numpy())
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db"}
    command = [
        sys.executable,
        "-c",
        SERVE,
        f"runs:/{run.info.run_id}/student",
        str(tmp_path / "x.npy"),
        str(tmp_path / "y.npy"),
    ]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "UserWarning" not in done.stderr
    mean, std = (torch.tensor(meta[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = net((pixels.float() / 255 - mean) / std)
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "y.npy")), expected)
    assert took < 20, took
