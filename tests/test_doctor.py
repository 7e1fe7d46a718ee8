"""`python -m pupil doctor`: every fault, made in a folder that stands for the checkout or for the machine, has its line and
the command that mends it; a sound one has none."""

import fcntl
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pupil import doctor, driver, installed
from pupil.doctor import Finding, checkout, machine, packages, places, store
from tests.environment import NAMESPACES, as_nobody

ROOT = Path(__file__).resolve().parents[1]
GIT = ("-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "init.defaultBranch=main")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout in which nothing is wrong."""
    for name in ("MLFLOW_TRACKING_URI", "PYTHONPATH", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    root = tmp_path / "checkout"
    (root / ".dvc/tmp").mkdir(parents=True)
    (root / ".dvc/config").write_text("[core]\n    analytics = false\n")
    (root / "dvc.yaml").write_text("stages: {}\n")
    (root / "requirements.txt").write_text(
        "torch==2.15.0 \\\n    --hash=sha256:00\nmlflow[extras]==3.0 ; python_version > '3'\n"
    )
    for words in (("init", "-q"), ("add", "-A"), ("commit", "-q", "-m", "start")):
        subprocess.run(["git", *GIT, *words], cwd=root, check=True)
    monkeypatch.chdir(root)
    monkeypatch.setattr(packages, "installed", lambda: {"torch": "2.15.0+cu126", "mlflow": "3.0"})
    return root


def wrong(findings: Iterator[Finding]) -> list[str]:
    """The lines of what must be mended."""
    return [finding.line for finding in findings if finding.mend]


def only(findings: Iterator[Finding]) -> str:
    (line,) = wrong(findings)
    assert "; mend it: " in line
    assert "\n" not in line
    return line


def test_a_sound_checkout_has_nothing_to_mend(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", [check for check in doctor.CHECKS if check not in OF_THE_MACHINE])
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*") if ".git" not in p.parts}
    assert doctor.doctor(root) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "nothing is wrong"
    assert all(line.startswith("ok    ") for line in lines[:-1])
    assert {line[6:].split(":")[0] for line in lines[:-1]} >= {"packages", "writing", "git", "DVC", "locks", "tracking store"}
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*") if ".git" not in p.parts}.keys() == before.keys()


OF_THE_MACHINE = (checkout.code, machine.gpu, machine.threads, machine.memory, machine.shared_memory, places.space)


def test_a_fault_gives_status_1_and_a_broken_check_stops_no_other(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(root: Path) -> Iterator[Finding]:
        raise RuntimeError("no such\nluck")

    monkeypatch.setattr(doctor, "CHECKS", [breaks, packages.packages])
    assert doctor.doctor(root) == 1
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("WRONG breaks: cannot be examined (RuntimeError: no such luck); mend it: ")
    assert second == "ok    packages: all 2 as requirements.txt has them"
    assert last == "1 to be mended"


def test_without_torch_hydra_mlflow_and_dvc_it_says_what_is_missing(tmp_path: Path) -> None:
    """In a Python that has nothing but its standard library."""
    code = "import sys, runpy; sys.argv = ['pupil', 'doctor']; runpy.run_module('pupil', run_name='__main__', alter_sys=True)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); {code}"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        text=True,
        capture_output=True,
        timeout=100,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert "are missing: " in done.stdout
    assert (
        "WRONG torch: cannot be imported (ModuleNotFoundError: No module named 'torch'); mend it: rm -f .venv/ready"
        in done.stdout
    )
    assert "WRONG DVC: the command dvc is not on the PATH; mend it: make setup" in done.stdout
    assert "ok    tracking store: " in done.stdout


# --- packages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("here", "said"),
    [
        ({"torch": "2.15.0"}, "1 of 2 are missing: mlflow"),
        ({"torch": "2.11.0+cpu", "mlflow": "3.0"}, "1 of 2 are of another version: torch 2.11.0+cpu, locked 2.15.0"),
    ],
)
def test_packages_that_are_missing_or_of_another_version(
    here: dict[str, str], said: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "installed", lambda: here)
    line = only(packages.packages(root))
    assert said in line
    assert line.endswith("; mend it: rm -f .venv/ready && make setup")


def test_a_lock_that_is_lost(root: Path) -> None:
    (root / "requirements.txt").unlink()
    assert only(packages.packages(root)).endswith("git checkout requirements.txt")


def test_this_environment_has_what_the_lock_says_of_the_packages_that_count() -> None:
    lock, here = packages.locked(ROOT), installed.installed()
    assert len(lock) > 100
    assert all(packages.public(here[name]) == lock[name] for name in ("torch", "mlflow", "dvc", "hydra-core", "safetensors"))


def two_dalis(folder: Path) -> None:
    """As pip leaves them: two distributions that own the same package."""
    for name in ("nvidia_dali_cuda110", "nvidia_dali_cuda120"):
        (folder / f"{name}-1.0.dist-info").mkdir(parents=True)
        (folder / f"{name}-1.0.dist-info/METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n"
        )


def test_two_dali_packages(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_dalis(tmp_path / "site")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    assert "nvidia-dali-cuda110 and nvidia-dali-cuda120 overwrite one another's files" in only(packages.dali(root))


def test_another_python_than_the_lock_s_and_another_environment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrong(packages.python(root)) == []
    (root / ".venv/bin").mkdir(parents=True)
    (root / ".venv/bin/python").touch()
    assert only(packages.python(root)).endswith("mend it: source .venv/bin/activate")
    monkeypatch.setattr(sys, "prefix", str(root / ".venv"))
    monkeypatch.setattr(sys, "version_info", (3, 13, 1))
    assert "python: 3.13.1" in only(packages.python(root))


# --- the code that runs ----------------------------------------------------------------------------------------------------


def test_the_code_of_another_checkout(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrong(checkout.code(ROOT)) == []
    (root / "src/pupil").mkdir(parents=True)
    (root / "src/pupil/__init__.py").touch()
    assert f"pupil is that of {ROOT}, not of {root}" in only(checkout.code(root))
    monkeypatch.setenv("PYTHONPATH", f"elsewhere{os.pathsep}{ROOT / 'src'}")
    assert only(checkout.code(root)).endswith("mend it: unset PYTHONPATH")


def test_a_file_called_like_a_package(root: Path) -> None:
    (root / "torch.py").touch()
    assert f"{root}/torch.py is imported instead of torch; mend it: mv " in only(checkout.code(ROOT))


# --- the machine --------------------------------------------------------------------------------------------------------


class Torch(SimpleNamespace):
    """What the check asks of torch, with or without CUDA, with so many GPUs in sight."""

    def __init__(self, version: str, cuda: str | None, seen: int = 0) -> None:
        sight = SimpleNamespace(
            is_available=lambda: seen > 0, device_count=lambda: seen, get_device_name=lambda i: f"NVIDIA H{i}00"
        )
        super().__init__(__version__=version, version=SimpleNamespace(cuda=cuda), cuda=sight)


@pytest.mark.parametrize(
    ("found", "devices", "hide", "said"),
    [
        (
            Torch("2.15.0+cpu", None),
            ["nvidia0"],
            None,
            "nvidia0 is here, but torch 2.15.0+cpu is built without CUDA; mend it: rm -f",
        ),
        (Torch("2.15.0", "13.2"), ["nvidia0"], None, "nvidia0 is here, but torch 2.15.0 (CUDA 13.2) sees none"),
        (Torch("2.15.0", "13.2"), ["nvidia0"], "", "hidden by CUDA_VISIBLE_DEVICES, trainings run on the CPU; mend it: unset"),
        (Torch("2.15.0", "13.2"), [], None, "none here, trainings run on the CPU (torch 2.15.0)"),
        (Torch("2.15.0", "13.2", 1), ["nvidia0"], None, "torch 2.15.0 (CUDA 13.2) sees NVIDIA H000"),
    ],
    ids=["built without CUDA", "driver too old", "hidden", "no GPU", "seen"],
)
def test_a_gpu_that_torch_does_not_see(
    found: Torch, devices: list[str], hide: str | None, said: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", found)
    monkeypatch.setattr(driver, "DEVICES", tmp_path / "dev")
    monkeypatch.setattr(machine, "listed", lambda: [])
    monkeypatch.setattr(driver, "DRIVER", tmp_path / "nowhere")
    for device in devices:
        (tmp_path / "dev").mkdir()
        (tmp_path / "dev" / device).touch()
    if hide is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hide)
    (finding,) = machine.gpu(root)
    assert said in finding.line
    assert finding.line.startswith("WRONG") == bool(devices and not found.cuda.is_available())


def test_nvidia_smi_names_a_gpu_that_has_no_device_file(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin/nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(driver, "DEVICES", tmp_path)
    monkeypatch.setitem(sys.modules, "torch", Torch("2.15.0+cpu", None))
    assert "GPU 0: NVIDIA H100 is here, but torch 2.15.0+cpu is built without CUDA" in only(machine.gpu(root))


def test_a_torch_that_cannot_be_imported(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "torch: cannot be imported" in only(machine.gpu(root))


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A / whose /proc, /sys and /dev say what a test wants."""
    for name in ("proc", "sys/fs/cgroup", "dev/shm"):
        (tmp_path / "system" / name).mkdir(parents=True)
    monkeypatch.setattr(machine, "SYSTEM", tmp_path / "system")
    return tmp_path / "system"


def test_threads_that_slow_a_training_down(root: Path, system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert wrong(machine.threads(root)) == []
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    assert "OMP_NUM_THREADS=64 on 8 cores; mend it: unset OMP_NUM_THREADS" in only(machine.threads(root))
    monkeypatch.delenv("OMP_NUM_THREADS")
    (system / "sys/fs/cgroup/cpu.max").write_text("200000 100000\n")
    assert "2 cores (of 8, by the container's limit), and torch takes 8 threads; mend it: export OMP_NUM_THREADS=2" in only(
        machine.threads(root)
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert wrong(machine.threads(root)) == []
    for name, value in (("GOMP_SPINCOUNT", "infinity"), ("OMP_WAIT_POLICY", "active")):
        monkeypatch.setenv(name, value)
        assert f"{name}={value} makes them spin" in only(machine.threads(root))


def test_little_memory(root: Path, system: Path) -> None:
    (system / "proc/meminfo").write_text("MemTotal: 64000000 kB\nMemAvailable:   32000000 kB\n")
    assert wrong(machine.memory(root)) == []
    for name, text in (("max", "4000000000"), ("current", "3500000000"), ("stat", "anon 5\nfile 100000000\n")):
        (system / f"sys/fs/cgroup/memory.{name}").write_text(text)
    assert "0.6 GB free, 2 are needed" in only(machine.memory(root))
    (system / "sys/fs/cgroup/memory.stat").write_text("file 3000000000\n")
    assert wrong(machine.memory(root)) == []
    (system / "proc/meminfo").write_text("MemAvailable: 1000 kB\n")
    assert "0.0 GB free" in only(machine.memory(root))


def test_little_shared_memory(root: Path, system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda p: SimpleNamespace(total=64 << 20, free=64 << 20))
    assert "67 MB in" in only(machine.shared_memory(root))
    (system / "dev/shm").rmdir()
    assert "is not there: loader: workers cannot work" in only(machine.shared_memory(root))


# --- folders --------------------------------------------------------------------------------------------------------------


def test_folders_that_cannot_be_written(root: Path) -> None:
    (root / "out").mkdir()
    with as_nobody(root):
        lines = wrong(places.writable(root))
    assert any(f"writing: out: {root}/out: Permission denied; mend it: sudo chown -R" in line for line in lines)
    assert any("writing: DVC's cache: " in line for line in lines)


def test_a_file_in_the_place_of_a_folder(root: Path) -> None:
    (root / "runs").touch()
    assert only(places.writable(root)).endswith(f"mv {root}/runs {root}/runs.old")


@pytest.mark.skipif(not NAMESPACES, reason="no mounts of one's own here")
@pytest.mark.parametrize(
    ("mount", "said"),
    [
        ("mount --bind out out && mount -o remount,ro,bind out", "Read-only file system; mend it: mount -o remount,rw {out}"),
        (
            "mount -t tmpfs -o size=64k none out && head -c 65536 /dev/zero > out/x",
            "No space left on device; mend it: make clean",
        ),
        ("mount -t tmpfs -o size=64k none out", "disk: 0.0 GB free for out, 2 are needed; mend it: make clean"),
    ],
    ids=["read-only", "full", "almost full"],
)
def test_a_disk_that_is_read_only_or_full(mount: str, said: str, root: Path) -> None:
    """Mounted for real, in a namespace of its own."""
    (root / "out").mkdir()
    code = (
        "from pathlib import Path; from pupil.doctor import places; r = Path.cwd();"
        "print(*(f.line for check in (places.writable, places.space) for f in check(r)), sep='\\n')"
    )
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", f'({mount}) 2>/dev/null; exec {sys.executable} -c "{code}"'],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        text=True,
        capture_output=True,
    )
    assert said.format(out=root / "out") in done.stdout, done.stdout + done.stderr


def test_dvcs_cache_may_be_elsewhere(root: Path, tmp_path: Path) -> None:
    assert places.cache(root) == root / ".dvc/cache"
    (root / ".dvc/config.local").write_text(f"[cache]\n    dir = {tmp_path / 'shelf'}\n")
    assert places.cache(root) == tmp_path / "shelf"
    (tmp_path / "shelf").touch()
    assert "DVC's cache" in only(places.writable(root))


# --- git and DVC --------------------------------------------------------------------------------------------------------


def lose_git(root: Path) -> None:
    subprocess.run(["rm", "-rf", ".git"], cwd=root, check=True)


def unborn(root: Path) -> None:
    lose_git(root)
    subprocess.run(["git", *GIT, "init", "-q"], cwd=root, check=True)


def conflict(root: Path) -> None:
    script = (
        "git checkout -q -b b; echo b > dvc.yaml; git commit -qam b; git checkout -q main; echo c > dvc.yaml; git commit -qam c"
    )
    environment = {**os.environ, "EMAIL": "test@example.org", "GIT_AUTHOR_NAME": "t", "GIT_COMMITTER_NAME": "t"}
    subprocess.run(f"{script}; git merge -q b", cwd=root, shell=True, env=environment, capture_output=True)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lose_git, "is no checkout: records cannot name the commit; mend it: git init"),
        (unborn, "there is no commit yet; mend it: git add"),
        (conflict, "1 in conflict; mend it: git merge --abort"),
    ],
)
def test_git_that_does_not_know_the_commit(
    spoil: Callable[[Path], None], said: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(root.parent))
    spoil(root)
    assert said in only(checkout.git(root))


def test_git_that_distrusts_the_owner(root: Path) -> None:
    with as_nobody(root):
        assert f"belongs to somebody else; mend it: git config --global --add safe.directory {root}" in only(checkout.git(root))


def test_git_and_dvc_that_are_missing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "git: not installed" in only(checkout.git(root))
    first, second = wrong(checkout.dvc(root))
    assert "the command dvc is not on the PATH; mend it: make setup" in first
    assert "stages would be started with no python at all" in second


def test_another_python_on_the_path_than_this_one(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text("#!/bin/sh\n")
    (tmp_path / "bin/python").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    assert f"stages would be started with {tmp_path}/bin/python" in only(checkout.dvc(root))


@pytest.mark.parametrize(
    ("name", "said"), [(".dvc", "is not initialised; mend it: dvc init"), ("dvc.yaml", "mend it: git checkout dvc.yaml")]
)
def test_dvc_that_is_not_set_up(name: str, said: str, root: Path) -> None:
    (root / name).rename(root / "gone")
    assert said in only(checkout.dvc(root))


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ("{", "is damaged; mend it: rm .dvc/tmp/rwlock"),
        ('{"write": 3}', "is damaged"),
        (json.dumps({"write": {"out": {"pid": os.getpid(), "cmd": "repro"}}}), f"names process {os.getpid()}, which is no DVC"),
    ],
)
def test_a_stale_lock_of_dvc(held: str, said: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkout, "command", lambda pid: "python -m something")
    (root / ".dvc/tmp/rwlock").write_text(held)
    assert said in only(checkout.locks(root))


def test_a_lock_of_a_process_that_is_gone_or_of_a_dvc_that_works_is_fine(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    (root / ".dvc/tmp/rwlock").write_text(json.dumps({"read": {"a": [{"pid": gone.pid, "cmd": "repro"}]}}))
    assert wrong(checkout.locks(root)) == []
    (root / ".dvc/tmp/rwlock").write_text(json.dumps({"read": {"a": [{"pid": os.getpid(), "cmd": "repro"}]}}))
    monkeypatch.setattr(checkout, "command", lambda pid: "python dvc repro")
    (finding,) = checkout.locks(root)
    assert f"DVC is at work here: process {os.getpid()}" in finding.line


def test_points_of_interrupted_trainings(root: Path) -> None:
    point = root / ".work/resume/0123"
    point.mkdir(parents=True)
    (point / "point.safetensors").write_bytes(b"x" * 3_000_000)
    (point / "lock").touch()
    (finding,) = checkout.points(root)
    assert finding.line == "ok    resume points: 1 of interrupted trainings, 3 MB: the same command goes on from them"
    with open(point / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (finding,) = checkout.points(root)
        assert finding.line == "ok    resume points: 1 trainings are running; none"
    long_ago = time.time() - 31 * 24 * 3600
    for path in (*point.iterdir(), point):
        os.utime(path, (long_ago, long_ago))
    assert only(checkout.points(root)).endswith("1 are older than 30 days; mend it: rm -r .work/resume/0123")
    (point / "damaged.safetensors").touch()
    assert "1 were damaged and set aside" in only(checkout.points(root))


# --- the tracking store -------------------------------------------------------------------------------------------------


def sql(path: Path, *commands: str) -> None:
    with sqlite3.connect(path) as file:
        for command in commands:
            file.execute(command)
    file.close()


def made_by(version: str) -> tuple[str, ...]:
    table = "CREATE TABLE alembic_version (version_num VARCHAR(32))"
    return (table, f"INSERT INTO alembic_version VALUES ('{version}')", "CREATE TABLE runs (run_uuid VARCHAR(32))")


def test_a_database_that_mlflow_cannot_read(root: Path) -> None:
    path, known = root / "mlflow.db", store.revisions()
    assert len(known) > 10
    assert wrong(store.store(root)) == []
    for version, said in (
        (known[-1], None),
        (known[-3], f"was made by an older MLflow; mend it: mlflow db upgrade sqlite:///{path}"),
        ("ffff", "was made by a newer MLflow than is installed here"),
    ):
        path.unlink(missing_ok=True)
        sql(path, *made_by(version))
        assert (said is None) == (wrong(store.store(root)) == [])
        assert said is None or said in only(store.store(root))
    path.unlink()
    sql(path, "CREATE TABLE cats (name TEXT)")
    assert "is no database of MLflow; mend it: mv " in only(store.store(root))
    raw = path.read_bytes()
    for spoiled in (b"no database at all" * 100, raw[:5000], raw[:100] + b"\xff" * 900 + raw[1000:]):
        path.write_bytes(spoiled)
        line = only(store.store(root))
        assert f"{path} is damaged" in line
        assert line.endswith(f"mend it: mv {path} {path}.damaged && python -m pupil sync")


def test_runs_that_an_old_mlflow_left_as_files(root: Path) -> None:
    for run in ("a" * 32, "b" * 32):
        (root / "mlruns/0" / run).mkdir(parents=True)
        (root / "mlruns/0" / run / "meta.yaml").touch()
    (root / "mlruns/0/meta.yaml").touch()
    line = only(store.store(root))
    assert f"old runs: 2 in {root}/mlruns are files of an old MLflow" in line
    assert f"mlflow migrate-filestore --source {root}/mlruns --target sqlite:///{root}/old.db" in line


@pytest.mark.parametrize("uri", ["./mlruns", "file:///data/mlruns"])
def test_a_folder_as_the_store(uri: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert "is a folder, which MLflow does not write to any more; mend it: mlflow migrate-filestore --source" in only(
        store.store(root)
    )


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server on this machine; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize(("status", "said"), [(200, None), (401, None), (503, "answers 503; mend it: start the server again")])
def test_a_server_that_answers(status: int, said: str | None, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(status) as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:se@cret@127.0.0.1:{port}")
        lines = [finding.line for finding in store.store(root)]
    assert "cret" not in " ".join(lines)
    assert lines[0].startswith("ok    " if said is None else "WRONG")
    assert said is None or said in lines[0]


@pytest.mark.parametrize("uri", ["http://me:secret@127.0.0.1:9", "postgresql+psycopg2://me:secret@127.0.0.1:9/runs"])
def test_a_server_that_does_not_answer(uri: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    line = only(store.store(root))
    assert "127.0.0.1:9" in line
    assert "secret" not in line
    assert "unset MLFLOW_TRACKING_URI" in line


def test_every_check_is_made_and_says_something(root: Path) -> None:
    """On this machine, whatever it is like."""
    findings = list(doctor.examine(root))
    assert len(findings) >= len(doctor.CHECKS)
    assert not [finding for finding in findings if "cannot be examined" in finding.said]
    assert torch.__version__ in " ".join(finding.said for finding in findings)
