"""The tracking store: whether it answers, and whether it is one that this MLflow reads."""

import os
import re
import socket
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pupil.doctor.finding import SETUP, Finding
from pupil.tracking.store import without_password

PATIENCE = 5  # seconds
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def store(root: Path) -> Iterator[Finding]:
    yield from left_over(root)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"
    kind = urlsplit(uri).scheme.partition("+")[0]
    if kind in ("http", "https"):
        yield server(uri)
    elif kind == "sqlite":
        yield database(Path(unquote(uri.partition(":///")[2])), root)
    elif kind in PORTS:
        yield reachable(uri, PORTS[kind])
    elif kind in ("", "file"):
        said = f"MLFLOW_TRACKING_URI={uri} is a folder, which MLflow does not write to any more"
        yield Finding(
            "tracking store", said, f"{migrate(Path(unquote(urlsplit(uri).path)), root)} && unset MLFLOW_TRACKING_URI"
        )
    else:
        yield Finding("tracking store", f"{without_password(uri)} is not examined")


def left_over(root: Path) -> Iterator[Finding]:
    """Runs of an MLflow that kept them as files: `make ui` does not show them."""
    folder = root / "mlruns"
    if runs := len(list(folder.glob("*/*/meta.yaml"))):
        yield Finding(
            "old runs", f"{runs} in {folder} are files of an old MLflow, which `make ui` does not show", migrate(folder, root)
        )


def migrate(folder: Path, root: Path) -> str:
    """Into a database of their own: MLflow does not add to one that holds runs."""
    target = root / "old.db"
    return f"mlflow migrate-filestore --source {folder} --target sqlite:///{target} && mv {folder} {folder}.old"


def server(uri: str) -> Finding:
    """Any answer will do, and no password is sent."""
    try:
        urllib.request.urlopen(f"{without_password(uri).rstrip('/')}/health", timeout=PATIENCE).close()
    except urllib.error.HTTPError as e:
        if e.code >= 500:
            return Finding("tracking store", f"{without_password(uri)} answers {e.code}", "start the server again")
    except (OSError, ValueError) as e:
        reason = getattr(e, "reason", e)
        said = (
            f"{without_password(uri)} does not answer ({reason}); trainings go on, `python -m pupil sync` later completes them"
        )
        return Finding("tracking store", said, "start the server, or unset MLFLOW_TRACKING_URI")
    return Finding("tracking store", f"{without_password(uri)} answers")


def reachable(uri: str, port: int) -> Finding:
    parts = urlsplit(uri)
    try:
        socket.create_connection((parts.hostname or "localhost", parts.port or port), PATIENCE).close()
    except OSError as e:
        return Finding(
            "tracking store", f"{without_password(uri)} cannot be reached ({e})", "start it, or unset MLFLOW_TRACKING_URI"
        )
    return Finding("tracking store", f"{without_password(uri)} can be reached")


def database(path: Path, root: Path) -> Finding:
    again = f"mv {path} {path}.damaged && python -m pupil sync"  # the records hold what was in it
    if not path.exists():
        return Finding("tracking store", f"{path} is made by the first run")
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=PATIENCE)) as file:
            pages, page = (file.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
            state = file.execute("PRAGMA quick_check(1)").fetchone()[0] if pages * page <= path.stat().st_size else "cut short"
            tables = {name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            found = file.execute("SELECT version_num FROM alembic_version").fetchone() if "alembic_version" in tables else None
            runs = file.execute("SELECT COUNT(*) FROM runs").fetchone()[0] if "runs" in tables else 0
    except sqlite3.Error as e:
        return Finding("tracking store", f"{path} is damaged ({e})", again)
    if state != "ok":
        return Finding("tracking store", f"{path} is damaged ({state.splitlines()[0]})", again)
    if tables and found is None:
        return Finding("tracking store", f"{path} is no database of MLflow", again)
    known = revisions()
    if found and known and found[0] not in known:
        return Finding("tracking store", f"{path} was made by a newer MLflow than is installed here", SETUP)
    if found and known and found[0] != known[-1]:
        return Finding("tracking store", f"{path} was made by an older MLflow", f"mlflow db upgrade sqlite:///{path}")
    return Finding("tracking store", f"{path}, {runs} runs")


def revisions() -> list[str]:
    """The formats of MLflow's database that are known here, the newest last; none where MLflow is missing.  Imports nothing."""
    package = find_spec("mlflow")
    if package is None or package.origin is None:
        return []
    pages = [p.read_text() for p in (Path(package.origin).parent / "store/db_migrations/versions").glob("*.py")]
    steps = {before: new for page in pages for new, before in [(named(page, "revision"), named(page, "down_revision"))]}
    order: list[str] = []
    while (new := steps.get(order[-1] if order else "")) and new not in order:
        order.append(new)
    return order


def named(page: str, name: str) -> str:
    found = re.search(rf"^{name}(?:: [^=]+)? = [\"'](\w+)[\"']", page, re.MULTILINE)
    return found[1] if found else ""
