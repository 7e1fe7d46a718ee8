"""Run records -> MLflow: while training (`Stream`) or later (`sync`), by the same code (`mirror.Mirror`).

The only folder that imports mlflow, and only inside functions.  Everything goes through MlflowClient: no active run, no
global URI, so nothing in the environment can catch our runs.  The record is the truth: what is missing in the store is
found by asking the store, and a store that does not answer costs seconds, never a run.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from pupil import record
from pupil.tracking.mirror import Mirror
from pupil.tracking.store import RECORD, address, connect, find_runs, first_line, is_complete, unusable

__all__ = ["Mirror", "Stream", "connect", "parent_from_environment", "sync"]

LATER = "run `python -m pupil sync` later"


def parent_from_environment() -> dict[str, str] | None:
    """The group of a process below `mlflow run`; the variable is removed, or every stage would write into that run."""
    run = os.environ.pop("MLFLOW_RUN_ID", None)
    return {"key": f"mlflow-{run}", "name": "mlflow run"} if run else None


class Stream:
    """Mirrors a growing record from a process of its own; whatever happens there, training goes on.

    A thread would do, but for the seconds in which it imports mlflow: then it and torch wait for one another.
    """

    def __init__(self, folder: Path, home: Path, experiment: str) -> None:
        self.folder = folder
        self.child: subprocess.Popen[bytes] | None = None
        if find_spec("mlflow") is None:
            warn(f"tracking: mlflow is not installed here; {folder} keeps the record: run `python -m pupil sync` where it is")
            return
        source = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "pupil.tracking.follow", str(folder), str(home), experiment]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2, env={**os.environ, "PYTHONPATH": path})

    def changed(self) -> None:
        if self.child is not None and self.child.stdin is not None:
            with contextlib.suppress(OSError):  # it has given up
                self.child.stdin.write(b".")
                self.child.stdin.flush()

    def close(self, seconds: float | None = None) -> None:
        """Waits for the last push; the other side sees to it that a store that does not answer costs seconds.

        `seconds`: at most; then the other side pushes on by itself.
        """
        if self.child is None:
            return
        try:
            self.child.communicate(timeout=seconds)
        except OSError:
            pass
        except subprocess.TimeoutExpired:
            warn(f"tracking: {self.folder} is still on its way to the store; if it does not arrive, {LATER}")
            return
        if self.child.returncode != 0:
            warn(f"tracking: {self.folder} is not complete in the store; {LATER}")


def sync(roots: Iterable[Path], home: Path, experiment: str) -> tuple[int, int, int]:
    """Mirrors the finished records below the roots: (created, completed, present before)."""
    store = connect(home, experiment)
    from mlflow import MlflowException

    complete: dict[str, bool] = {}
    for run in find_runs(store, f"tags.`{RECORD}` LIKE '%'"):
        uid = run.data.tags[RECORD]
        complete[uid] = complete.get(uid, False) or is_complete(run)
    created = completed = present = 0
    for folder in record.find(roots):
        try:
            facts = record.read(folder)
            if facts["status"] == "RUNNING":
                continue
            if complete.get(facts["uid"]):
                present += 1
                continue
            mirror = Mirror(folder, store)
            complete[facts["uid"]] = mirror.push()
            created, completed = created + mirror.created, completed + (not mirror.created)
        except MlflowException as e:
            if e.error_code != "INVALID_PARAMETER_VALUE":
                raise unusable(address(home)[0], e) from None
            warn(f"sync: {folder} skipped: {first_line(e)}")
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as e:
            warn(f"sync: {folder} skipped: {type(e).__name__}: {first_line(e)}")
    return created, completed, present


def warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
