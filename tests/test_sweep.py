"""A sweep by submitit: every job leaves a record, a model and a run in MLflow of its own; tasks of one job train as one."""

import contextlib
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from pupil import record
from pupil.config import ROOT
from pupil.sweep import launcher
from pupil.types import UserError
from tests.test_distributed import PAGE

DATA, TRAIN = PAGE[:3], ("train.role=student", "optim.epochs=1", "optim.lr=1e-6", "prepared=data")
LOCAL = ("-m", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10")


def run(folder: Path, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """As a user of a checkout whose code is not installed types it."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "SLURM_"))}
    env |= {"OMP_NUM_THREADS": "1", "DVC_ROOT": str(folder)}  # where the MLflow store is
    command = [sys.executable, str(ROOT / "stages" / f"{name}.py"), *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def runs_of(folder: Path) -> list[tuple[str, str]]:
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as store:
        return store.execute("select name, status from runs order by name").fetchall()


@pytest.mark.slow
def test_jobs_of_a_sweep(tmp_path: Path) -> None:
    done = run(tmp_path, "prepare", *DATA, "out=data", "record=prepared")
    assert not done.returncode, done.stderr
    teacher = (*DATA, "device=cpu", "train.role=teacher", "train.network=resnet8", "teacher.optim.epochs=1", "prepared=data")
    done = run(tmp_path, "train", *teacher, "out=teacher", "record=teacher-record")
    assert not done.returncode, done.stderr

    cell = (*PAGE, "optim.epochs=1", "prepared=data", "distill.checkpoint=teacher", "distill.student=resnet8")
    done = run(tmp_path, "distill", *LOCAL, *cell, "distill.method=kd,simkd", "distill.seed=0,1")
    assert not done.returncode, done.stderr
    assert done.stdout.splitlines()[-1] == "submitit_local: all jobs are done"
    found = [record.read(path.parent) for path in (tmp_path / "runs").glob("distill-*/record/record.json")]
    cells = {(facts["params"]["method"], facts["params"]["seed"]) for facts in found}
    assert cells == {(method, seed) for method in ("kd", "simkd") for seed in (0, 1)}
    assert len(found) == 4
    assert {facts["status"] for facts in found} == {"FINISHED"}
    assert {facts["environment"]["command"][0] for facts in found} == {"distill.py"}
    assert {"distill.method=kd", "distill.seed=1"} <= set().union(*(facts["environment"]["command"] for facts in found))
    models = [path.parent.name for path in (tmp_path / "runs").glob("distill-*/model/*.safetensors")]
    assert len(models) >= 4
    rows = runs_of(tmp_path)
    assert {row for row in rows if row[0].startswith("resnet8 by")} == {
        (f"resnet8 by {method} from resnet8, seed {seed}", "FINISHED") for method, seed in cells
    }

    done = run(tmp_path, "distill", *LOCAL, *cell, "distill.method=kd", "distill.seed=0,1", "optim.lr=1e30")
    assert done.returncode == 2
    assert re.fullmatch(r"error: the loss term .* try a smaller lr\..*", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_tasks_of_one_job_train_as_one_process(tmp_path: Path) -> None:
    done = run(tmp_path, "prepare", *DATA, "out=data", "record=prepared")
    assert not done.returncode, done.stderr
    logged = []
    for name, words in (("alone", ()), ("shared", (*LOCAL, "hydra.launcher.tasks_per_node=2"))):
        done = run(tmp_path, "train", *words, *PAGE, *TRAIN, f"out={name}", f"record={name}-record")
        assert not done.returncode, done.stderr
        logged.append(record.read_metrics(tmp_path / f"{name}-record")[0]["values"])
    assert record.read(tmp_path / "shared-record")["environment"]["device"] == "2 processes, cpu"
    for key in ("train/loss", "val/nll"):
        assert logged[1][key] == pytest.approx(logged[0][key], rel=1e-5)
    done = run(tmp_path, "train", *LOCAL, *PAGE, *TRAIN, "processes=2")
    assert done.returncode == 2
    said = "error: processes=2: a job of submitit is shared by its tasks, and this one has 1;"
    assert done.stderr.splitlines()[-1] == f"{said} use processes=1 hydra.launcher.tasks_per_node=2"


@pytest.mark.slow
def test_without_slurm_one_line_says_so(tmp_path: Path) -> None:
    done = run(tmp_path, "train", "-m", "hydra/launcher=submitit_slurm", *PAGE, *TRAIN)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: submitit_slurm: RuntimeError: Could not detect")


def test_a_launcher_is_for_sweeps() -> None:
    assert launcher(["optim.epochs=1"]) is None
    assert launcher(["-m", "hydra/launcher=basic"]) is None
    assert launcher(["--multirun", "hydra/launcher=submitit_slurm"]) == "submitit_slurm"
    with pytest.raises(UserError, match="add -m"):
        launcher(["hydra/launcher=submitit_local"])
