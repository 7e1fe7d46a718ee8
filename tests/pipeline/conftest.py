"""A clone of this working tree in a temporary folder, its small pipeline run once, and what is asked of both."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from pupil.tracking.store import load_mlflow

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent  # not resolved: the virtual environment's own
SMALL = {
    "teachers": ["resnet8"],
    "methods": ["kd", "simkd"],
    "seeds": [0, 1],
    "data.image_size": 16,
    "data.train_images": 40,
    "data.val_images": 20,
    "data.test_images": 60,
    "optim.epochs": 2,
    "teacher.optim.epochs": 2,
    "hp.crd.k": 16,
}


class Done(NamedTuple):
    """A process that has ended."""

    status: int
    out: str
    err: str
    seconds: float

    @property
    def text(self) -> str:
        return self.out + self.err


@dataclass(frozen=True)
class Checkout:
    """A clone, and what one does with it at a prompt."""

    path: Path

    def environment(self, **more: str) -> dict[str, str]:
        """The caller's, without what would lead elsewhere; the clone's code, not that which the environment installs."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "DVC_", "GIT_", "PYTEST_", "PYTHON"))}
        return {
            **kept,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.path / "src"),
            "OMP_NUM_THREADS": "1",
            "GOMP_SPINCOUNT": "1000",
            "DVC_NO_ANALYTICS": "1",
            "DVC_SITE_CACHE_DIR": str(self.path.parent / "dvc-site"),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            **more,
        }

    def start(self, *command: str, **more: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        environment = self.environment(**more)
        return subprocess.Popen(
            command, cwd=self.path, env=environment, text=True, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe
        )

    def attempt(self, *command: str, **more: str) -> Done:
        """Runs a command, whatever comes of it."""
        started = time.monotonic()
        process = self.start(*command, **more)
        try:
            out, err = process.communicate(timeout=900)
        finally:
            process.kill()
        return Done(process.returncode, out, err, time.monotonic() - started)

    def run(self, *command: str, **more: str) -> Done:
        """Runs a command that must succeed."""
        done = self.attempt(*command, **more)
        assert done.status == 0, f"{' '.join(command)}: status {done.status}\n{done.text}"
        return done

    def edit(self, changes: Mapping[str, Any]) -> None:
        """Edits params.yaml."""
        path = self.path / "params.yaml"
        tree = yaml.safe_load(path.read_text())
        for key, value in changes.items():
            *sections, last = key.split(".")
            node = tree
            for section in sections:
                node = node[section]
            assert last in node or sections[:1] == ["hp"], f"params.yaml has no {key}"
            node[last] = value
        path.write_text(yaml.safe_dump(tree, sort_keys=False))

    def out_of_date(self) -> set[str]:
        """The stages of which a dependency, a parameter or an output is not what it was."""
        return set(json.loads(self.run("dvc", "status", "--json").out))

    def commit(self, message: str) -> None:
        self.run("git", "add", "-A")
        self.run("git", "commit", "-q", "-m", message)

    def remove(self, *names: str) -> None:
        for name in names:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def records(self) -> dict[str, dict[str, Any]]:
        """uid -> record, of the pipeline and of runs by hand."""
        found = [json.loads(p.read_text()) for root in ("out", "runs") for p in (self.path / root).rglob("record.json")]
        return {facts["uid"]: facts for facts in found}


def make_clone(path: Path) -> Checkout:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, path / name)
    clone = Checkout(path)
    clone.remove("dvc.lock", "reports")
    clone.edit(SMALL)
    clone.run("git", "init", "-q", "-b", "main")
    clone.run("git", "config", "user.name", "test")
    clone.run("git", "config", "user.email", "test@example.org")
    clone.commit("start")
    return clone


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A clone in which nothing has run; only for copying and for what changes nothing."""
    return make_clone(tmp_path_factory.mktemp("start") / "pupil")


@pytest.fixture(scope="session")
def finished(start: Checkout) -> tuple[Checkout, Done]:
    """A clone after its first `dvc repro`, committed, and what that said; not to be changed."""
    clone = copy(start, start.path.parent.with_name("finished") / "pupil")
    first = clone.run("dvc", "repro")
    clone.commit("results")
    return clone, first


@pytest.fixture
def workspace(finished: tuple[Checkout, Done], empty_store: Path, tmp_path: Path) -> Checkout:
    """A copy of the finished clone, DVC's cache included, with a store in which there is no run."""
    clone = copy(finished[0], tmp_path / "pupil")
    clone.remove("mlflow.db", "mlruns")  # they name the first clone's folder
    shutil.copy(empty_store, clone.path / "mlflow.db")
    return clone


def copy(clone: Checkout, path: Path) -> Checkout:
    shutil.copytree(clone.path, path, symlinks=True)
    return Checkout(path)


class Run(NamedTuple):
    """What MLflow shows of a run."""

    id: str
    name: str
    status: str
    parent: str | None
    uid: str | None  # of the record
    stage: str | None
    params: dict[str, str]
    curves: dict[str, list[tuple[int, float]]]  # metric -> (step, value)
    digests: list[str]  # of the data sets
    models: int
    artifacts: set[str]


def runs_of(clone: Checkout, experiment: str = "pupil") -> list[Run]:
    """The runs of an experiment, the oldest first."""
    client = load_mlflow()(f"sqlite:///{clone.path / 'mlflow.db'}")
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return []
    runs = client.search_runs([found.experiment_id], order_by=["attributes.start_time ASC"], max_results=1000)
    return [describe(client, run) for run in runs]


def describe(client: Any, run: Any) -> Run:
    id, tags = run.info.run_id, run.data.tags
    curves = {key: [(p.step, p.value) for p in client.get_metric_history(id, key)] for key in run.data.metrics}
    return Run(
        id,
        run.info.run_name,
        run.info.status,
        tags.get("mlflow.parentRunId"),
        tags.get("pupil.record"),
        tags.get("pupil.stage"),
        run.data.params,
        {key: sorted(points) for key, points in curves.items()},
        [i.dataset.digest for i in run.inputs.dataset_inputs],
        len(run.outputs.model_outputs) if run.outputs else 0,
        {f.path for f in client.list_artifacts(id)},
    )


def curves_of(clone: Checkout) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """uid of the record -> every metric's history."""
    runs = [run for run in runs_of(clone) if run.uid is not None]
    assert len({run.uid for run in runs}) == len(runs), "a record has two runs"
    return {str(run.uid): run.curves for run in runs}


@pytest.fixture(scope="session")
def downstream(finished: tuple[Checkout, Done]) -> dict[str, set[str]]:
    """stage -> all that depend on it, directly or not: `dvc status` looks at files as they are, not as they will be."""
    edges = re.findall(r'"(.+?)" -> "(.+?)"', finished[0].run("dvc", "dag", "--dot").out)
    stages = {stage for edge in edges for stage in edge}

    def after(stage: str) -> set[str]:
        nexts = {b for a, b in edges if a == stage}
        return nexts.union(*(after(b) for b in nexts))

    return {stage: after(stage) for stage in stages}


def ran(done: Done) -> set[str]:
    """The stages that `dvc repro` ran, those from the cache left out."""
    return set(re.findall(r"Running stage '(.+?)'", done.text))
