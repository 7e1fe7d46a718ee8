"""Options and limits of all tests."""

import shutil
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: several threads on a busy machine are many times slower than one


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="folder with golden vectors (npz); every case in it is checked (default: tests/golden)",
    )
    parser.addoption("--full", action="store_true", help="the full forms of the load tests, which take many minutes")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables and nothing else: making one takes seconds."""
    from pupil.tracking.store import load_mlflow

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    load_mlflow()(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def home(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the checkout, with an empty store."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "my home"
    home.mkdir()
    shutil.copy(empty_store, home / "mlflow.db")
    return home
