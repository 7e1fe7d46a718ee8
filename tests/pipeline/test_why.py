"""The command that `python -m pupil why` prints for a cell of the pipeline, run where nothing is left of the first run."""

import re
import shlex
from pathlib import Path

import pytest

from tests.pipeline.conftest import Checkout, copy

pytestmark = pytest.mark.pipeline
CELL = "distill@resnet8-resnet8-kd-0"
MODEL = "out/models/distill/resnet8-resnet8/kd/0"


def weights(clone: Checkout) -> str:
    return next(
        facts["outputs"]["model.safetensors"]
        for facts in clone.records().values()
        if facts["stage"] == "distill" and facts["tags"]["dvc.stage"] == CELL
    )


def command(clone: Checkout) -> str:
    return clone.run("python", "-m", "pupil", "why", MODEL, "--command").out.strip()


def repeated(clone: Checkout, path: Path, line: str) -> str:
    """What the line gives in a copy without outputs and without DVC's cache."""
    again = copy(clone, path)
    again.remove("out", "mlflow.db", "mlruns", "runs", ".dvc/cache", "dvc.lock")
    again.run("git", "checkout", "-q", "--", ".")
    done = again.run("bash", "-c", line)
    assert f"Running stage '{CELL}'" in done.text
    return weights(again)


def test_a_cell_is_run_again_from_its_commit_and_from_its_configuration(start: Checkout, tmp_path: Path) -> None:
    clone = copy(start, tmp_path / "clone")
    clone.edit({"optim.lr": 0.03})  # uncommitted, as while one tries things
    clone.run("dvc", "repro", CELL)
    clone.run("git", "checkout", "-q", "params.yaml")
    first = weights(clone)
    line = command(clone)
    assert re.fullmatch(rf"cp \.work/why/\w+/params\.yaml params\.yaml && dvc repro {shlex.quote(CELL)}", line)
    assert repeated(clone, tmp_path / "second", line) == first

    clone.edit({"optim.lr": 0.03})
    assert command(clone) == f"dvc repro {CELL}", "params.yaml says what it said"
    clone.commit("the rate")
    clone.run("dvc", "repro", "--force", "--single-item", CELL)
    commit = clone.run("git", "rev-parse", "HEAD").out.strip()
    text = (clone.path / "src/pupil/fit.py").read_text()
    (clone.path / "src/pupil/fit.py").write_text(f"{text}\n# another version\n")
    clone.edit({"optim.lr": 0.01})
    clone.commit("another version")
    line = command(clone)
    assert line == f"git checkout {commit} && dvc repro {CELL}"
    assert repeated(clone, tmp_path / "third", line) == first
    shown = clone.run("python", "-m", "pupil", "why", MODEL).out
    assert f"commit {commit}, with uncommitted changes in dvc.lock; the code here is another" in shown or (
        f"commit {commit}; the code here is another" in shown
    )
    assert "differs      optim.lr was 0.03, params.yaml here says 0.01" in shown
