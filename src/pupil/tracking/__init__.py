"""Run records -> MLflow: while training (`Stream`) or later (`sync`), by the same code (`mirror.Mirror`).

The only folder that imports mlflow, and only inside functions.  Everything goes through MlflowClient: no active run, no
global URI, so nothing in the environment can catch our runs.  The record is the truth: what is missing in the store is
found by asking the store, and a store that does not answer costs seconds, never a run.
"""

import os
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pupil import record
from pupil.errors import UserError
from pupil.tracking.child import Child, kept, shared
from pupil.tracking.mirror import Mirror
from pupil.tracking.store import (
    RECORD,
    Store,
    address,
    connect,
    find_runs,
    first_line,
    is_complete,
    is_deleted,
    load_mlflow,
    unusable,
)

if TYPE_CHECKING:
    from mlflow.entities import Run

__all__ = ["Mirror", "Stream", "connect", "kept", "look_up", "parent_from_environment", "sync"]

LATER = "run `python -m pupil sync` later"


def parent_from_environment() -> dict[str, str] | None:
    """The group of a process below `mlflow run`; the variable is removed, or every stage would write into that run."""
    run = os.environ.pop("MLFLOW_RUN_ID", None)
    return {"key": f"mlflow-{run}", "name": "mlflow run"} if run else None


class Stream:
    """Mirrors a growing record from another process, one for all streams of this one; whatever happens there, training goes on.

    A thread would do, but for the seconds in which it imports mlflow: then it and torch wait for one another.
    """

    def __init__(self, folder: Path, home: Path, experiment: str) -> None:
        self.folder = folder
        self.child: Child | None = None
        if find_spec("mlflow") is None:
            warn(f"tracking: mlflow is not installed here; {folder} keeps the record: run `python -m pupil sync` where it is")
            return
        self.child = shared(home, experiment)
        self.number = self.child.open(folder)

    def changed(self) -> None:
        if self.child is not None:
            self.child.tell("grew", self.number)

    def close(self, seconds: float | None = None) -> None:
        """Waits for the last push; the other side sees to it that a store that does not answer costs seconds.

        `seconds`: at most; then the other side pushes on by itself.
        """
        complete = True if self.child is None else self.child.end(self.number, seconds)
        if complete is None:
            warn(f"tracking: {self.folder} is still on its way to the store; if it does not arrive, {LATER}")
        elif not complete:
            warn(f"tracking: {self.folder} is not complete in the store; {LATER}")


def sync(roots: Iterable[Path], home: Path, experiment: str) -> tuple[int, int, int]:
    """Mirrors the finished records below the roots: (created, completed, present before)."""
    store = connect(home, experiment)
    from mlflow import MlflowException

    known: dict[str, list[Run]] = {}
    for run in find_runs(store, f"tags.`{RECORD}` LIKE '%'"):
        known.setdefault(run.data.tags[RECORD], []).append(run)
    created = completed = present = 0
    for folder in record.find(roots):
        try:
            facts = record.read(folder)
            if facts["status"] == "RUNNING":
                continue
            mirror, runs = Mirror(folder, store), known.get(facts["uid"], [])
            if any(map(is_deleted, runs)) or (len(runs) == 1 and is_complete(runs[0], facts)):
                present += 1
                continue
            mirror.push()
            known[facts["uid"]] = [store.client.get_run(mirror.run)] if mirror.run else []
            created, completed = created + mirror.created, completed + (not mirror.created)
            if mirror.refused:
                more = f" and {len(mirror.refused) - 1} more" if mirror.refused[1:] else ""
                warn(f"sync: {folder}: the store refuses {mirror.refused[0]}{more}; the rest is there")
        except MlflowException as e:
            if e.error_code != "INVALID_PARAMETER_VALUE":
                raise unusable(address(home)[0], e) from None
            warn(f"sync: {folder} skipped: {first_line(e)}")
        except UserError as e:
            warn(f"sync: {folder} skipped: {first_line(e)}")
        except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as e:
            warn(f"sync: {folder} skipped: {type(e).__name__}: {first_line(e)}")
    return created, completed, present


def look_up(home: Path, text: str) -> tuple[str, Callable[[Path], None]] | None:
    """The uid of the record of the MLflow run whose id begins so, and how to fetch it; the store is not changed."""
    uri, remote = address(home)
    if find_spec("mlflow") is None or not (remote or "MLFLOW_TRACKING_URI" in os.environ or (home / "mlflow.db").exists()):
        return None
    try:
        store = Store(load_mlflow()(uri), "", home)
        found = [run for run in find_runs(store, f"tags.`{RECORD}` LIKE '%'") if run.info.run_id.startswith(text)]
    except Exception as e:
        raise unusable(uri, e) from None
    if not found:
        return None
    if len(found) > 1:
        raise UserError(f"{len(found)} runs in MLflow begin with {text}: give more of the id")

    def fetch(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            store.client.download_artifacts(found[0].info.run_id, "record.json", str(folder))
            if any(f.path == "config.json" for f in store.client.list_artifacts(found[0].info.run_id)):
                (folder / "artifacts").mkdir(exist_ok=True)
                store.client.download_artifacts(found[0].info.run_id, "config.json", str(folder / "artifacts"))
        except Exception as e:
            raise UserError(f"the record of run {found[0].info.run_id} cannot be fetched: {first_line(e)}") from None

    return found[0].data.tags[RECORD], fetch


def warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
