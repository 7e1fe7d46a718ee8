"""The run record: what a run was and what it measured, as plain files in one folder.  No MLflow, no torch.

    record.json     who, what, when: parameters, seeds, hashes of inputs and outputs, environment, final metrics
    metrics.jsonl   one line per epoch: {"step": 3, "time": 1700000000.1, "values": {"val/top1": 93.5, ...}}
    artifacts/      figures, tables, the resolved configuration

The record is the truth about a run; `tracking` mirrors it into MLflow while it grows or later.  record.json carries a
checksum of its own content and, once finished, that of metrics.jsonl; its times never go back, whatever the clock does.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pupil.errors import UserError
from pupil.sealed import checksum

VERSION = 1
PACKAGES = ("torch", "torchvision", "safetensors", "numpy", "pillow", "mlflow", "dvc", "hydra-core", "nvidia-dali-cuda120")
NEEDED = {"uid": str, "status": str, "stage": str, "name": str, "params": dict, "started": int | float}
STATES = ("RUNNING", "FINISHED", "FAILED", "KILLED", "SCHEDULED")  # MLflow's
TIMES, LATEST = ("started", "ended"), 1e11  # seconds since 1970; the store counts milliseconds in 64 bits
CODE = ("src/pupil/**/*.py", "stages/*.py", "networks/*.py")


class Clock:
    """Seconds since 1970 that never go back: where the machine's clock does, time goes on from the last reading."""

    def __init__(self, after: float) -> None:
        self.last, self.tick = max(after, time.time()), time.monotonic()

    def now(self) -> float:
        tick = time.monotonic()
        self.last, self.tick = max(time.time(), self.last + tick - self.tick), tick
        return self.last


class Record:
    """A record that grows: `log` per epoch, then `finish`.  `changed` is called after every write."""

    def __init__(
        self, folder: Path, facts: Mapping[str, Any], changed: Callable[[], None] = lambda: None, lines: str = ""
    ) -> None:
        """`facts`: stage, name, params (flat), seeds, inputs, group, teacher, data, model.

        Of a training that goes on they give uid and started too, and `lines` are those of its metrics.jsonl until then.
        """
        self.folder, self.changed, self.logged = folder, changed, lines
        earlier = [json.loads(line)["time"] for line in lines.splitlines()[-1:]]
        self.clock = Clock(max([facts.get("started", 0.0), *earlier]))
        self.facts = {"version": VERSION, "uid": uuid.uuid4().hex, "status": "RUNNING", "started": self.clock.now(), **facts}
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
        line = json.dumps({"step": step, "time": self.clock.now(), "values": dict(values)})
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
        self.facts |= {"status": status, "ended": self.clock.now(), "final": dict(final), "outputs": dict(outputs)}
        if (metrics := self.folder / "metrics.jsonl").exists():
            self.facts["metrics_sha256"] = sha256(metrics)
        self.write()

    def write(self) -> None:
        new = self.folder / "record.json.new"
        with open(new, "w") as f:
            facts = json.loads(json.dumps(self.facts))
            f.write(json.dumps({**facts, "checksum": checksum(facts)}, indent=1, sort_keys=True) + "\n")
            f.flush()
            os.fsync(f.fileno())
        new.replace(self.folder / "record.json")
        self.changed()


def read(folder: Path) -> dict[str, Any]:
    """The content of record.json, checked."""
    path = folder / "record.json"
    try:
        facts = json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # not JSON, or not even text
        raise damaged(path, "it is not JSON") from None
    if not isinstance(facts, dict):
        raise damaged(path, f"it holds a {type(facts).__name__}, not an object")
    if facts.pop("checksum", None) not in (None, checksum(facts)):
        raise damaged(path, "its content is not what its checksum says")
    if [key for key, value in facts.items() if key != "metrics_sha256" and re.fullmatch("[0-9a-f]{64}", str(value))]:
        raise damaged(path, "its checksum has lost its name")
    wrong = [key for key, kind in NEEDED.items() if not isinstance(facts.get(key), kind)]
    wrong += [key for key in TIMES if key in facts and not (isinstance(facts[key], int | float) and 0 <= facts[key] < LATEST)]
    wrong += [] if facts.get("status") in STATES else ["status"]
    if wrong or not re.fullmatch(r"[\w-]{1,64}", facts["uid"]):
        raise damaged(path, f"it has no right {(wrong or ['uid'])[0]!r}")
    return facts


def read_metrics(folder: Path, skip: int = 0) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl after the first `skip`; a line still being written is left out."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    found = []
    for number, line in enumerate(lines[skip:], skip + 1):
        if (entry := epoch(line)) is None:
            raise damaged(path, f"line {number} is not one of metrics")
        found.append(entry)
    return found


def epoch(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None if it is none."""
    try:
        entry = json.loads(line)
        right = type(entry["step"]) is int and isinstance(entry["time"], int | float) and isinstance(entry["values"], dict)
    except (ValueError, RecursionError, LookupError, TypeError):
        return None
    return entry if right else None


def verify(folder: Path, facts: Mapping[str, Any]) -> None:
    """Refuses the metrics of a finished record if they are not those that it was finished with."""
    path, expected = folder / "metrics.jsonl", facts.get("metrics_sha256")
    if expected is not None and (not path.exists() or sha256(path) != expected):
        raise damaged(path, "it is not the file that record.json was finished with")


def damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path} is damaged: {why}; delete {path.parent} and run dvc repro, or train again what was run by hand")


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
        **({"threads": sys.modules["torch"].get_num_threads()} if "torch" in sys.modules else {}),
        "device": device,
        "packages": found,
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": bool(changed := git("status", "--porcelain", "--untracked-files=no")),
        "git_changed": [line.split(maxsplit=1)[-1] for line in (changed or "").splitlines()[:50]],
        "code": code(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def code(root: Path = Path(__file__).resolve().parents[2]) -> str:
    """SHA-256 over the source that runs; equal where every file is, whatever git says."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in root.glob(pattern)):
        digest.update(f"{path.relative_to(root).as_posix()} {sha256(path)}\n".encode())
    return digest.hexdigest()


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
