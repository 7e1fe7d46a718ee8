"""A clone of this working tree in a temporary folder, its small pipeline run once, and what is asked of both."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

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
        return subprocess.Popen(command, cwd=self.path, env=environment, text=True, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)

    def attempt(self, *command: str, **more: str) -> Done:
        """Runs a command, whatever comes of it."""
        started = time.monotonic()
        process = self.start(*command, **more)
        try:
            out, err = process.communicate(timeout=300)
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
            assert last in node, f"params.yaml has no {key}"
            node[last] = value
        path.write_text(yaml.safe_dump(tree, sort_keys=False))

    def out_of_date(self) -> set[str]:
        """The stages that `dvc repro` would look at again; of a chain of them all, not the first alone."""
        stages: dict[str, Any] = json.loads(self.run("dvc", "status", "--json").out)
        return set(stages)

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
