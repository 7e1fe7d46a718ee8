"""The short form of `make chaos`, and what must not go on: the same training twice at once, another training, an orphan."""

import contextlib
import os
import random
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.blows import Blow, Sight, holder, wait_for
from tests.chaos.campaign import Siege, last
from tests.chaos.kinds import KINDS, Kind
from tests.chaos.lab import Going, Lab

pytestmark = pytest.mark.pipeline
KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
SHORT = {
    "student alone": Blow(KILL, "stage", "step", 3, 0.0, 0.0),
    "crd (banks)": Blow(TERM, "stage", "writing", 2, 0.0, 0.0),
    "refilled (phases)": Blow(KILL, "group", "epoch", 1, 0.0, 0.15),
    "sakd (policy)": Blow(INT, "group", "step", 6, 0.0, 0.0),
    "kd, streamed": Blow(KILL, "stage", "results", 1, 0.1, 0.0),
    "table": Blow(TERM, "group", "step", 2, 0.0, 0.0),
}
SMALL = Kind("table", "table", ("methods=[kd,crd]", "seeds=[0]"), models=2)
EARLY = Blow(KILL, "stage", "step", 2, 0.0, 0.0)  # for a training that is to be found in its middle


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("chaos"))
    yield made
    made.close()


def kind(name: str) -> Kind:
    (found,) = (kind for kind in KINDS if kind.name == name)
    return found


@pytest.mark.parametrize("name", SHORT)
def test_killed_and_started_again_it_ends_the_same(name: str, lab: Lab) -> None:
    report = Siege(lab, SMALL if name == SMALL.name else kind(name)).run(1, random.Random(0), [SHORT[name]])
    assert not report.wrong, str(report)


class Cell:
    """A training that takes long enough to be met in its middle, and its place."""

    def __init__(self, lab: Lab, *more: str, name: str = "long") -> None:
        self.lab, self.more = lab, ("distill.method=kd", "optim.epochs=40", "resume_every=0", *more)
        self.places = (f"out=runs/{name}/model", f"record=runs/{name}/record")
        self.sight = Sight(lab, [lab.path / f"runs/{name}"])

    def start(self, *more: str, **how: bool) -> Going:
        return self.lab.start("distill", *self.more, *more, *self.places, **how)

    def met(self) -> Going:
        going = self.start()
        assert wait_for(EARLY, going, self.sight), going.said
        return going


def stop(going: Going, number: signal.Signals = KILL) -> int:
    assert going.pid is not None
    os.kill(going.pid, number)
    return going.wait()


@pytest.fixture
def clean(lab: Lab) -> Iterator[None]:
    yield
    for name in ("runs/long", ".work/resume"):
        subprocess.run(["rm", "-rf", str(lab.path / name)], check=True)


@pytest.mark.usefixtures("clean")
def test_of_two_processes_at_one_training_the_second_stops_at_once_and_names_the_first(lab: Lab) -> None:
    cell = Cell(lab)
    first = cell.met()
    begun = time.monotonic()
    second = cell.start()
    assert second.wait() == 2
    assert first.status is None, "the first goes on"
    assert f"error: process {first.pid} is training this already (resnet8 by kd from resnet8, seed 0); wait for it" in last(
        second
    )
    assert second.said.count("\n") < 5
    assert time.monotonic() - begun < 30
    stop(first)


@pytest.mark.usefixtures("clean")
def test_workers_that_outlive_a_killed_training_do_not_hold_its_place(lab: Lab) -> None:
    cell = Cell(lab, "loader=workers")
    stop(cell.met())
    again = cell.start()
    assert wait_for(EARLY, again, cell.sight), again.said
    assert "goes on from epoch" in again.said
    stop(again)


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("what", ["code", "configuration", "teacher", "data"])
def test_a_training_that_is_another_one_begins_anew_and_leaves_the_point_alone(what: str, lab: Lab) -> None:
    cell = Cell(lab)
    stop(cell.met())
    (point,) = lab.resume.glob("*/point.safetensors")
    kept = point.read_bytes()
    more: tuple[str, ...] = ()
    path, text = lab.path / "src/pupil/fit.py", ""
    if what == "code":
        text = path.read_text()
        path.write_text(text + "# another comment\n")
    elif what == "configuration":
        more = ("optim.lr=0.03",)
    elif what == "teacher":
        if not (lab.path / "runs/other").exists():
            lab.run(
                "train", "train.role=teacher", "train.network=resnet8", "train.seed=5", "out=runs/other", "record=runs/other_r"
            )
        more = ("distill.checkpoint=runs/other",)
    else:
        if not (lab.path / "runs/data2").exists():
            lab.run("prepare", "data.seed=1", "out=runs/data2", "record=runs/data2_r")
        more = ("data.seed=1", "prepared=runs/data2")
    other = Cell(lab, *more, name="other_cell")
    going = other.start()
    try:
        while going.status is None and len(list(lab.resume.glob("*/point.safetensors"))) < 2:
            time.sleep(0.01)
        assert going.status is None, going.said
    finally:
        if what == "code":
            path.write_text(text)
        stop(going)
        subprocess.run(["rm", "-rf", str(lab.path / "runs/other_cell")], check=True)
    assert "goes on from" not in going.said
    assert point.read_bytes() == kept
    again = cell.start()
    while again.status is None and "goes on from epoch" not in again.said:
        time.sleep(0.01)
    assert "goes on from epoch" in again.said, "and the first one goes on"
    stop(again)


@pytest.mark.slow
def test_an_orphan_of_dvc_is_named_and_the_next_repro_ends_right(lab: Lab) -> None:
    repro = ("dvc", "repro", "--no-run-cache", "-s", "distill@resnet8-resnet8-kd-0")
    lab.clone.edit({"resume_every": 0, "optim.epochs": 60})
    folders = [lab.path / f"out/{part}/distill/resnet8-resnet8/kd/0" for part in ("models", "records")]
    sight = Sight(lab, folders)
    first = lab.command(*repro)
    assert wait_for(EARLY._replace(target="dvc"), first, sight), first.said
    orphan = holder(sight)
    assert orphan is not None
    stop(first)
    os.kill(orphan, signal.SIGSTOP)  # busy for as long as the second one takes; dvc removes its record meanwhile
    second = lab.command(*repro)
    assert second.wait() != 0
    assert f"error: process {orphan} is training this already" in second.said
    os.kill(orphan, signal.SIGCONT)
    while running(orphan):
        time.sleep(0.05)
    assert "metrics.jsonl: No such file or directory; mend that and run the same command: it goes on" in first.said
    third = lab.command(*repro)
    assert third.wait() == 0, third.said
    assert "goes on from epoch" in third.said
    assert {path.name for path in folders[0].iterdir()} == {"model.json", "model.safetensors", "predictions.safetensors"}
    assert not list(lab.resume.glob("*"))
    lab.clone.edit({"optim.epochs": 2})


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.usefixtures("clean")
def test_a_disk_that_is_really_full_for_points_leaves_the_one_before(lab: Lab) -> None:
    cell = Cell(lab)
    going = cell.met()
    assert going.pid is not None
    resource.prlimit(going.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    while "cannot be written" not in going.said:
        assert going.status is None, going.said
        time.sleep(0.01)
    (point,) = lab.resume.glob("*/point.safetensors")
    kept = point.read_bytes()
    assert stop(going, TERM) == 75
    assert "the point before it is kept, and training goes on" in going.said
    assert "stopped by SIGTERM, the point before it is kept" in last(going)
    assert point.read_bytes() == kept
    assert [path.name for path in point.parent.glob("*.new")] == []
    again = cell.start()
    assert wait_for(EARLY, again, cell.sight), again.said
    assert "goes on from epoch" in again.said
    stop(again)


@pytest.mark.usefixtures("clean")
def test_a_disk_that_is_really_full_for_results_ends_it_and_the_same_command_goes_on(lab: Lab) -> None:
    small = lab.path / "runs/small"
    small.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        cell = Cell(lab, "optim.epochs=2", name="small")
        first = cell.start()
        assert first.wait() == 2
        assert "error: " in last(first)
        assert "mend that and run the same command: it goes on" in last(first)
        assert "No space left on device" in last(first)
        assert not list(small.rglob("*.safetensors*"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        again = cell.start()
        assert again.wait() == 0, again.said
        assert "goes on from epoch" in again.said
        assert cell.sight.finished()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


@pytest.mark.slow
@pytest.mark.usefixtures("clean")
def test_a_stop_takes_seconds_even_where_the_tracking_server_hangs(lab: Lab) -> None:
    """And the process that follows survives a signal to all, to push what it can."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def hold() -> None:
            with contextlib.suppress(OSError):  # the server is closed
                while True:
                    held.append(server.accept()[0])

        holding = threading.Thread(target=hold, daemon=True)
        holding.start()
        cell = Cell(lab)
        folder = lab.folder()
        environment = lab.clone.environment(MLFLOW_TRACKING_URI=f"http://127.0.0.1:{server.getsockname()[1]}")
        with open(folder / "out", "ab") as out:
            process = subprocess.Popen(
                ["python", "stages/distill.py", *cell.more, *cell.places],
                cwd=lab.path, env=environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        going = Going(folder, process)
        assert wait_for(EARLY._replace(count=20), going, cell.sight), going.said
        while not held:  # the server has been asked
            time.sleep(0.05)
        hit = time.monotonic()
        os.killpg(process.pid, TERM)
        status = going.wait()
        seconds = time.monotonic() - hit
        followers = [p for p in Path("/proc").glob("[0-9]*") if b"pupil.tracking.follow" in content(p / "cmdline")]
        mine = [p for p in followers if (p / "cwd").resolve() == lab.path.resolve()]
        assert status == 75
        assert "stopped by SIGTERM, everything is saved: the same command goes on from here" in going.said
        assert seconds < 10, f"{seconds:.1f} s"
        assert mine, "it still tries to push"
        for path in mine:
            os.kill(int(path.name), KILL)
        server.shutdown(socket.SHUT_RDWR)  # wakes the thread
        holding.join(10)
    for connection in held:
        connection.close()


def content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
