"""Run records -> MLflow: while training (`Stream`) or later (`sync`), by the same code (`mirror.Mirror`).

The only folder that imports mlflow, and only inside functions.  Everything goes through MlflowClient: no active run, no
global URI, so nothing in the environment can catch our runs.  The record is the truth: what is missing in the store is
found by asking the store, and a store that does not answer costs seconds, never a run.
"""

import os
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from pupil import record
from pupil.tracking.mirror import Mirror
from pupil.tracking.store import RECORD, address, connect, find_runs, first_line, is_complete, load_mlflow, unusable

__all__ = ["Mirror", "Stream", "connect", "parent_from_environment", "sync"]

PATIENCE, PATIENCE_UNANSWERED = 120.0, 8.0  # seconds that `Stream.close` waits
LATER = "run `python -m pupil sync` later"


def parent_from_environment() -> dict[str, str] | None:
    """The group of a process below `mlflow run`; the variable is removed, or every stage would write into that run."""
    run = os.environ.pop("MLFLOW_RUN_ID", None)
    return {"key": f"mlflow-{run}", "name": "mlflow run"} if run else None


class Stream:
    """Mirrors a growing record from a thread of its own; whatever happens there, training goes on."""

    def __init__(self, folder: Path, home: Path, experiment: str) -> None:
        self.folder, self.home, self.experiment = folder, home, experiment
        self.news, self.closing = threading.Event(), threading.Event()
        self.asked: float | None = None  # when the store was first asked, time.monotonic()
        self.answered = self.complete = False
        self.thread = threading.Thread(target=self.work, name="tracking", daemon=True)
        self.thread.start()

    def changed(self) -> None:
        self.news.set()

    def close(self) -> None:
        """Waits for the last push, seconds if the store has not answered yet."""
        self.closing.set()
        self.news.set()
        closed = time.monotonic()
        while self.thread.is_alive() and time.monotonic() < self.deadline(closed):
            self.thread.join(0.05)
        if not self.complete:
            warn(f"tracking: {self.folder} is not complete in the store; {LATER}")

    def deadline(self, closed: float) -> float:
        if self.answered or self.asked is None or not address(self.home)[1]:
            return closed + PATIENCE
        return max(closed, self.asked) + PATIENCE_UNANSWERED

    def work(self) -> None:
        try:
            load_mlflow()
            self.asked = time.monotonic()
            store = connect(self.home, self.experiment)
            self.answered = True
            mirror = Mirror(self.folder, store)
            while not self.complete:
                self.news.wait()
                self.news.clear()
                last = self.closing.is_set()  # before the push: it sees all that was written before close()
                self.complete = mirror.push()
                if last:
                    return
                self.closing.wait(1)
        except Exception as e:
            warn(f"WARNING tracking is off: {first_line(e)}; training goes on")


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
