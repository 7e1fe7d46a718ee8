"""The run record: what a run was and what it measured, as plain files in one folder.  No MLflow, no torch.

    record.json     who, what, when: parameters, seeds, hashes of inputs and outputs, environment, final metrics
    metrics.jsonl   one line per epoch: {"step": 3, "time": 1700000000.1, "values": {"val/top1": 93.5, ...}}
    artifacts/      figures, tables, the resolved configuration

The record is the truth about a run; `tracking` mirrors it into MLflow while it grows or later.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

VERSION = 1
PACKAGES = ("torch", "torchvision", "safetensors", "numpy", "mlflow", "dvc", "hydra-core", "nvidia-dali-cuda120")


class Record:
    """A record that grows: `log` per epoch, then `finish`.  `changed` is called after every write."""

    def __init__(
        self, folder: Path, facts: Mapping[str, Any], changed: Callable[[], None] = lambda: None, lines: str = ""
    ) -> None:
        """`facts`: stage, name, params (flat), seeds, inputs, group, teacher, data, model.

        Of a training that goes on they give uid and started too, and `lines` are those of its metrics.jsonl until then.
        """
        self.folder, self.changed, self.logged = folder, changed, lines
        self.facts = {"version": VERSION, "uid": uuid.uuid4().hex, "status": "RUNNING", "started": time.time(), **facts}
        folder.mkdir(parents=True, exist_ok=True)
        self.write()  # first: it says whose the rest is
        (folder / "artifacts").mkdir(exist_ok=True)
        if lines:
            (folder / "metrics.jsonl").write_text(lines)

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Metrics of one epoch (1-based over all phases)."""
        line = json.dumps({"step": step, "time": time.time(), "values": dict(values)})
        with open(self.folder / "metrics.jsonl", "a") as f:
            f.write(line + "\n")
        self.logged += line + "\n"
        self.changed()

    def lines(self) -> str:
        """What is logged so far, as in metrics.jsonl, whatever has happened to that."""
        return self.logged

    def attach(self, name: str, content: Any) -> None:
        """Keeps plain values as artifacts/<name>, a JSON file."""
        (self.artifacts / name).write_text(json.dumps(content, indent=1) + "\n")

    def finish(self, final: Mapping[str, float], outputs: Mapping[str, str], status: str = "FINISHED") -> None:
        """`final`: metrics of the finished run; `outputs`: file name -> SHA-256."""
        self.facts |= {"status": status, "ended": time.time(), "final": dict(final), "outputs": dict(outputs)}
        self.write()

    def write(self) -> None:
        new = self.folder / "record.json.new"
        new.write_text(json.dumps(self.facts, indent=1, sort_keys=True) + "\n")
        new.replace(self.folder / "record.json")
        self.changed()


def read(folder: Path) -> dict[str, Any]:
    """The content of record.json."""
    return json.loads((folder / "record.json").read_text())


def read_metrics(folder: Path, skip: int = 0) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl after the first `skip`; a line still being written is left out."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines[skip:]]


def find(roots: Iterable[Path]) -> list[Path]:
    """Every record folder below the roots."""
    return sorted(path.parent for root in roots for path in root.rglob("record.json"))


def environment(device: str) -> dict[str, Any]:
    """Versions, machine and source; no environment variable, no user or host name."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "device": device,
        "packages": found,
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 0.1}} -> {"optim.lr": 0.1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
