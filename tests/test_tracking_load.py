"""Many runs, many points, many processes at once; the full forms by hand:

python -m pytest -q -s tests/test_tracking_load.py --full
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from pupil import tracking
from pupil.record import Record
from tests.tracked import SRC, assert_mirrored, epochs, facts, finished, runs, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:::(mlflow|pydantic|sqlalchemy|alembic|google).*"),
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning"),  # sqlite connections that MLflow keeps until the end
]
METRICS, EPOCHS = 40, 240

SYNC = """
import re, sys, time
from pathlib import Path
from pupil import tracking
def peak():  # MiB; the kernel's ru_maxrss would be that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
home = Path(sys.argv[1])
store = tracking.connect(home, "pupil")
before, start = peak(), time.monotonic()
print(*tracking.sync([home / "out"], home, "pupil"))
print(time.monotonic() - start, time.process_time(), before, peak())
"""


class Synced(NamedTuple):
    """A sync in a process of its own."""

    counts: str
    seconds: float
    grew: float  # MiB of memory at the peak, more than before
    told: str


def sync(home: Path) -> Synced:
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    done = subprocess.run([sys.executable, "-c", SYNC, str(home)], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    counts, measured = done.stdout.splitlines()
    seconds, cpu, before, peak = (float(x) for x in measured.split())
    told = (
        f"{seconds:.0f} s, {cpu:.0f} of them on the processor, peak memory {peak:.0f} MiB, {peak - before:.0f} more than before"
    )
    return Synced(counts, seconds, peak - before, told)


def long_record(folder: Path, metrics: int, steps: int) -> Record:
    record = Record(folder, facts(params={"lr": 0.1, "seed": folder.name}, group={"key": "pipe-1", "name": "pipeline"}))
    for step in range(1, steps + 1):
        record.log({f"distil/m{i}": i + 1 / step for i in range(metrics)}, step)
    record.finish({"test/top1": 51.5}, {})
    return record


@pytest.mark.slow
def test_many_long_runs_are_synced_in_bounded_time_and_memory(home: Path, request: pytest.FixtureRequest) -> None:
    full = request.config.getoption("--full")
    count, seconds, memory = (200, 1800, 200) if full else (8, 120, 100)
    records = [long_record(home / "out" / str(i), METRICS, EPOCHS) for i in range(count)]
    done = sync(home)
    size = (home / "mlflow.db").stat().st_size / 2**20
    print(f"{count} runs, {METRICS} metrics, {EPOCHS} epochs: {done.told}, {size:.0f} MiB of database")
    assert done.counts == f"{count} 0 0"
    assert done.seconds < seconds
    assert done.grew < memory
    done = sync(home)
    print(f"again, with nothing to do: {done.told}")
    assert done.counts == f"0 0 {count}"
    assert done.seconds < 30
    client, found = runs(home)
    assert len(found) == count
    for run in (found[0], found[-1]):
        assert len(run.data.metrics) == METRICS + 1
        for key in (f"distil/m{i}" for i in range(METRICS)):
            assert [p.step for p in client.get_metric_history(run.info.run_id, key)] == list(range(1, EPOCHS + 1))
    assert len({record.facts["uid"] for record in records} & {run.data.tags["pupil.record"] for run in found}) == count


@pytest.mark.slow
def test_a_record_of_a_hundred_thousand_points(home: Path) -> None:
    long_record(home / "out" / "a", 50, 2000)
    done = sync(home)
    print(f"100,000 points: {done.told}")
    assert done.counts == "1 0 0"
    assert done.seconds < 180
    assert done.grew < 300
    client, (run,) = runs(home)
    assert sum(len(client.get_metric_history(run.info.run_id, f"distil/m{i}")) for i in range(50)) == 100_000
    assert sync(home).counts == "0 0 1"


@pytest.mark.slow
def test_eight_processes_on_a_fresh_store_lose_nothing(home: Path) -> None:
    (home / "mlflow.db").unlink()
    processes = [train(home, home / "out" / str(i), seconds=4) for i in range(8)]
    for process in processes:
        out, err = process.communicate(timeout=400)
        assert (process.returncode, err) == (0, ""), (out, err)
    client, found = runs(home)
    assert len(found) == 8
    assert len({run.data.tags["mlflow.parentRunId"] for run in found}) == 1
    assert len(client.search_runs([found[0].info.experiment_id], "tags.`pupil.pipeline` = 'pipe-1'")) == 1
    for run in found:
        assert run.info.status == "FINISHED"
        for key in ("loss", "val/top1"):
            assert [p.step for p in client.get_metric_history(run.info.run_id, key)] == list(range(1, 21))
    assert tracking.sync([home / "out"], home, "pupil") == (0, 0, 8)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a PostgreSQL server that is started for these tests."""
    missing = [name for name in ("initdb", "postgres") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"PostgreSQL is not installed: no {missing[0]} on PATH")
    drivers = [name for name in ("psycopg", "psycopg2") if find_spec(name)]
    if not drivers:
        pytest.skip("PostgreSQL's driver is not installed: no psycopg or psycopg2")
    user: list[str] = []
    if os.geteuid() == 0:  # PostgreSQL refuses root
        if shutil.which("runuser") is None:
            pytest.skip("PostgreSQL refuses root, and there is no runuser")
        user = ["runuser", "-u", "nobody", "--"]
    place = Path("/tmp") / f"pupil-postgres-{os.getpid()}"  # other users cannot enter pytest's folders
    place.mkdir(mode=0o700)
    if user:
        shutil.chown(place, "nobody")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "cwd": "/"}
    subprocess.run([*user, "initdb", "-D", str(place / "data"), "-A", "trust", "-U", "pupil"], check=True, **quiet)
    options = ["-D", str(place / "data"), "-p", str(port), "-k", str(place), "-h", "127.0.0.1"]
    with open(place / "log", "w") as log:
        server = subprocess.Popen([*user, "postgres", *options], cwd="/", stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while "ready to accept connections" not in (place / "log").read_text():
            assert server.poll() is None, (place / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield f"postgresql+{drivers[0]}://pupil@127.0.0.1:{port}/postgres"
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(place)


@pytest.mark.slow
def test_postgresql_keeps_all_that_sqlite_keeps(home: Path, postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:

    from pupil import checkpoint, models

    monkeypatch.setenv("MLFLOW_TRACKING_URI", postgres)
    processes = [train(home, home / "trained" / str(i), seconds=4) for i in range(4)]  # they make the tables
    for process in processes:
        out, err = process.communicate(timeout=400)
        assert (process.returncode, err) == (0, ""), (out, err)
    done = finished(home / "out" / "a", model="../model")
    meta = {"network": "resnet8", "method": None, "surgery": {}, "classes": list("abc"), "image_size": 16, "role": "student"}
    checkpoint.save(
        home / "out" / "model", models.build("resnet8", 3).state_dict(), {**meta, "mean": [0.5] * 3, "std": [0.2] * 3}
    )
    half = Record(home / "out" / "b", facts())
    epochs(half, 1, 2)
    mirror = tracking.Mirror(half.folder, tracking.connect(home, "pupil"))
    assert not mirror.push()
    epochs(half, 3, 4)
    (half.artifacts / "table.csv").write_text("a,b\n")
    half.finish({"test/top1": 51.5}, {})
    assert tracking.sync([home / "out", home / "trained"], home, "pupil") == (1, 1, 4)
    assert tracking.sync([home / "out", home / "trained"], home, "pupil") == (0, 0, 6)
    run = assert_mirrored(home, done)
    assert_mirrored(home, half)
    client, found = runs(home)
    assert len(found) == 6
    assert len(client.search_runs([run.info.experiment_id], "tags.`pupil.pipeline` = 'pipe-1'")) == 1
    root = home / "mlruns"
    assert {"table.csv", "record.json", "model.safetensors"} <= {path.name for path in root.rglob("*")}
    (output,) = run.outputs.model_outputs
    assert client.get_logged_model(output.model_id).status == "READY"
    fetched = client.download_artifacts(run.info.run_id, "record.json", str(home))
    assert Path(fetched).read_bytes() == (done.folder / "record.json").read_bytes()
    assert not list(home.glob("*.db-journal"))
    long_record(home / "long" / "a", 40, 240)
    start = time.monotonic()
    assert tracking.sync([home / "long"], home, "pupil") == (1, 0, 0)
    print(f"PostgreSQL: 9,600 points in {time.monotonic() - start:.1f} s")
