"""What a pipeline leaves, byte by byte: no pickle, no secret, nothing that others may write to."""

import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.pickles import pickles
from tests.pipeline.conftest import SECRETS, Checkout, Done

pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.filterwarnings("ignore:::(mlflow|pydantic|sqlalchemy|alembic|google).*"),
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning"),  # sqlite connections that MLflow keeps until the end
]
LEFT = ("out", "reports", "runs", "mlruns", ".work", ".dvc", "mlflow.db", "dvc.lock")


def left(clone: Checkout) -> Iterator[Path]:
    """Every file that was not there before the pipeline ran, DVC's cache and MLflow's store included."""
    before = set(clone.run("git", "ls-tree", "-r", "--name-only", "HEAD~1").out.splitlines())
    for path in sorted(clone.path.rglob("*")):
        inside = path.relative_to(clone.path)
        ours = inside.parts[0] != ".git" and "__pycache__" not in inside.parts and str(inside) not in before
        if ours and path.is_file():
            yield path


def test_nothing_that_a_pipeline_leaves_is_a_pickle(finished: tuple[Checkout, Done]) -> None:
    clone, _ = finished
    files = list(left(clone))
    assert {path.relative_to(clone.path).parts[0] for path in files} >= set(LEFT) - {"runs", ".work"}
    kinds = {path.suffix for path in files}
    assert {".safetensors", ".json", ".jsonl", ".png", ".db", ".md"} <= kinds
    found = [line for path in files for line in pickles(str(path.relative_to(clone.path)), path.read_bytes())]
    assert found == []


def test_no_value_of_the_environment_and_no_password_is_in_what_is_left(workspace: Checkout) -> None:
    """The pipeline ran with secrets around it; here a stage runs by hand with one more, in the address of a dead server."""
    address = "http://me:pw-hidden-in-the-address@127.0.0.1:9"
    done = workspace.run("python", "stages/prepare.py", MLFLOW_TRACKING_URI=address)
    assert "WARNING tracking is off" in done.err, "the address was used"
    workspace.run("python", "-m", "pupil", "sync")
    secrets = [*SECRETS.values(), "pw-hidden-in-the-address"]
    assert [s for s in secrets if s in done.text] == []
    files = [path for path in workspace.path.rglob("*") if path.is_file() and ".git" not in path.parts]
    made = {path.relative_to(workspace.path).parts[0] for path in files}
    assert made >= {"out", "runs", "mlruns", "mlflow.db"}
    wanted = [secret.encode() for secret in secrets]
    found = [(str(path), secret) for path in files for secret in wanted if secret in path.read_bytes()]
    assert found == []
    names = {name for path in files if path.name == "record.json" for name in SECRETS if name.encode() in path.read_bytes()}
    assert names == set(), "nor the variables' names"
    with closing(sqlite3.connect(workspace.path / "mlflow.db")) as store:
        rows = [str(row) for table in ("tags", "params", "experiment_tags") for row in store.execute(f"SELECT * FROM {table}")]
    assert rows
    assert not [row for row in rows if "-hidden-" in row]


def test_what_is_left_can_be_written_by_its_owner_alone(finished: tuple[Checkout, Done]) -> None:
    clone, _ = finished
    everyone = [path for path in left(clone) if path.stat().st_mode & stat.S_IWOTH]
    assert everyone == []
