"""A published teacher and a published student by one setting each: only the distilled students train."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pupil.models import build
from tests.pipeline.conftest import Checkout, ran, runs_of
from tests.test_published import as_published

pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.filterwarnings("ignore:::(mlflow|pydantic|sqlalchemy|alembic|google).*"),
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning"),  # sqlite connections that MLflow keeps until the end
]
CELL = {"distill@resnet8-resnet8-kd-0", "evaluate"}


def publish(path: Path, seed: int) -> dict[str, torch.Tensor]:
    """A file in RepDistiller's layout; its network's state dict under our keys."""
    torch.manual_seed(seed)
    net = build("resnet8", 10)
    path.parent.mkdir(exist_ok=True)
    model = as_published("resnet8", net.state_dict())
    torch.save({"epoch": 240, "model": model, "best_acc": torch.tensor(9.5)}, path)
    return net.state_dict()


def test_published_networks_stand_for_a_teacher_and_a_baseline(workspace: Checkout) -> None:
    teacher = publish(workspace.path / "pub/resnet8.pth", 1)
    publish(workspace.path / "pub/student-0.pth", 2)
    workspace.edit({"methods": ["kd"], "seeds": [0]})
    workspace.edit({"teacher.checkpoint": "pub/{network}.pth", "student.checkpoint": "pub/student-{seed}.pth"})
    before = set(workspace.records())
    done = workspace.run("dvc", "repro")
    assert ran(done) == {"train_teacher@resnet8", "train_student@resnet8-0", *CELL}
    assert "Traceback" not in done.text
    new = [facts for uid, facts in workspace.records().items() if uid not in before and facts["stage"] != "evaluate"]
    epochs = {facts["stage"]: facts["params"].get("optim.epochs") for facts in new}
    assert epochs == {"train_teacher": None, "train_student": None, "distill": 2}
    (taught,) = [facts for facts in new if facts["stage"] == "distill"]
    (lender,) = [facts for facts in new if facts["stage"] == "train_teacher"]
    assert taught["teacher"]["uid"] == lender["uid"]
    saved = load_file(workspace.path / "out/models/teacher/resnet8/model.safetensors")
    assert all(torch.equal(saved[key], value) for key, value in teacher.items())

    names = [line.split("|")[1].strip() for line in (workspace.path / "reports/table.md").read_text().splitlines()[2:5]]
    assert names == ["resnet8, imported", "resnet8 alone, imported", "resnet8 by kd from resnet8"]
    assert json.loads((workspace.path / "reports/metrics.json").read_text())["resnet8 alone"]["imported"] == 1
    shown = {run.name: run for run in runs_of(workspace)}["teacher resnet8, imported"]
    assert (shown.status, shown.models, shown.params["checkpoint"]) == ("FINISHED", 1, "pub/resnet8.pth")
    assert set(shown.curves) == {f"test/{name}" for name in ("top1", "top5", "nll", "ece")}

    assert ran(workspace.run("dvc", "repro")) == set()
    publish(workspace.path / "pub/resnet8.pth", 3)
    assert ran(workspace.run("dvc", "repro")) == set(), "DVC does not see it"
    seen = workspace.attempt("python", "-m", "pupil", "pipeline")
    command = "dvc repro --force --single-item train_teacher"
    assert seen.err.splitlines() == [
        f"error: teacher.checkpoint: pub/resnet8.pth has changed since it was imported; run {command}"
    ]
    assert ran(workspace.run(*command.split())) == {"train_teacher@resnet8"}
    assert ran(workspace.run("dvc", "repro")) == CELL

    workspace.edit({"teacher.checkpoint": "pub/nowhere.pth"})
    failed = workspace.attempt("dvc", "repro")
    errors = [line for line in failed.text.splitlines() if line.startswith("error: ")]
    nowhere = workspace.path / "pub/nowhere.pth"
    assert errors == [f"error: teacher.checkpoint: cannot read {nowhere}: No such file or directory"]
