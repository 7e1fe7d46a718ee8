"""The MLflow store: where it is, how it is opened by many processes at once, what is in it."""

import fcntl
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pupil.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # seconds
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",  # would copy the uv.lock of the working directory into models
}
RECORD, COMPLETE, PIPELINE = "pupil.record", "pupil.complete", "pupil.pipeline"  # tags


class Store(NamedTuple):
    client: "MlflowClient"
    experiment: str  # its id
    home: Path  # the checkout: locks, and the artifacts of a local store


def connect(home: Path, experiment: str) -> Store:
    """The store of MLFLOW_TRACKING_URI, else <home>/mlflow.db; made if need be, as is the experiment."""
    client_of = load_mlflow()
    uri, remote = address(home)
    try:
        with nullcontext() if remote else locked(home, "mlflow"):  # two processes that create the tables break them
            client = client_of(uri)
            return Store(client, experiment_id(client, experiment, None if remote else home), home)
    except UserError:
        raise
    except Exception as e:
        raise unusable(uri, e) from None


def address(home: Path) -> tuple[str, bool]:
    """URI of the store, and whether a server stands between."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home.resolve() / 'mlflow.db'}"
    return uri, uri.startswith(("http://", "https://", "databricks"))


def load_mlflow() -> "type[MlflowClient]":
    """Imports mlflow (seconds), quiet and impatient unless the environment says otherwise."""
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # 90 lines for a full disk, which we say in one
    try:
        from mlflow import MlflowClient
    except ModuleNotFoundError as e:
        raise UserError(
            f"MLflow cannot be used here ({e}); what the records hold can be synced wherever it is installed"
        ) from None
    return MlflowClient


def experiment_id(client: "MlflowClient", name: str, home: Path | None) -> str:
    if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return client.get_experiment(given).experiment_id
    found = client.get_experiment_by_name(name)
    if found is None:
        from mlflow import MlflowException

        try:
            return client.create_experiment(name, (home.resolve() / "mlruns").as_uri() if home else None)
        except MlflowException:  # another process was faster
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise UserError(f"experiment {name!r} was deleted: mlflow experiments restore -x {found.experiment_id}, or rename it")
    return found.experiment_id


@contextmanager
def locked(home: Path, name: str) -> Iterator[Path]:
    path = home / ".work" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield path


def find_runs(store: Store, condition: str, deleted: bool = True) -> list["Run"]:
    """In all experiments; what the user deleted counts as found, or it would come back with every sync."""
    from mlflow.entities import ViewType

    experiments = [e.experiment_id for e in store.client.search_experiments()]
    view, found, token = ViewType.ALL if deleted else ViewType.ACTIVE_ONLY, [], None
    while True:
        page = store.client.search_runs(experiments, condition, view, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def is_deleted(run: "Run") -> bool:
    return run.info.lifecycle_stage != "active"


def is_complete(run: "Run", facts: Mapping[str, Any]) -> bool:
    """Whether nothing more will come from a record in this state: what finished stays so, what was interrupted may go on."""
    if is_deleted(run):
        return True
    if COMPLETE not in run.data.tags:
        return False
    if run.info.status == "FINISHED":
        return True
    return facts["status"] not in ("RUNNING", "FINISHED") and (run.info.end_time or 0) >= milliseconds(facts["ended"])


def milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


def first_line(e: Exception) -> str:
    lines = [line for line in str(e).strip().splitlines() if not line.startswith("(raised as a result of")]
    line = without_password((lines or [type(e).__name__])[0])
    return line if len(line) <= 200 else line[:197] + "..."


def without_password(text: str) -> str:
    """http://user:password@host -> http://host."""
    return re.sub(r"//[^/\s]*@", "//", text)  # to the last @: a password may have one


def unusable(uri: str, e: Exception) -> UserError:
    return UserError(f"the tracking store {without_password(uri)} cannot be used: {first_line(e)}")
