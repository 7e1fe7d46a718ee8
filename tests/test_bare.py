"""A GPU box with torch, torchvision, safetensors, numpy and Pillow alone: it trains, and the records come home."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pupil import checkpoint, config, record, tracking
from pupil.data import prepare
from pupil.tracking.store import find_runs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:::(mlflow|pydantic|sqlalchemy|alembic|google).*"),
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning"),  # sqlite connections that MLflow keeps until the end
]
ROOT = Path(__file__).resolve().parents[1]
LACKING = ("mlflow", "hydra", "omegaconf", "dvc", "nvidia.dali", "sklearn", "matplotlib", "psutil", "tqdm", "scipy", "yaml")
BLOCK = f"""
from importlib.machinery import PathFinder

find = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    lacking = any(name == n or name.startswith(n + ".") for n in {LACKING})
    return None if lacking else find(name, path, target)

PathFinder.find_spec = find_spec
"""


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is carried there: prepared data and a resolved configuration; and a Python that lacks the rest."""
    box = tmp_path_factory.mktemp("box")
    (box / "site").mkdir()
    (box / "site/sitecustomize.py").write_text(BLOCK)
    more = ["data.train_images=40", "data.val_images=20", "data.test_images=30", "data.image_size=16", "optim.epochs=1"]
    more += ["teacher.optim.epochs=2", "teachers=[resnet14]", "students=[resnet8]", "hp.crd.k=8", "hp.crd.dim=8"]
    resolved = subprocess.run([sys.executable, "-m", "pupil", "resolve", *more], cwd=ROOT, env=full(), **TEXT)
    assert resolved.stderr == ""
    (box / "box.json").write_text(resolved.stdout)
    prepare(config.from_json([str(box / "box.json")]).data, box / "out/data")
    return box


TEXT = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "check": False, "timeout": 120}


def full() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src")}


def bare(box: Path, *args: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *args], cwd=box, env={**os.environ, "PYTHONPATH": str(box / "site")}, **TEXT)


def stage(box: Path, name: str, *overrides: str) -> str:
    """Runs a stage there; what it printed.  It says once that mlflow is missing, and nothing else."""
    done = bare(box, str(ROOT / "stages" / f"{name}.py"), "--config", "box.json", "device=cpu", *overrides)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("tracking: mlflow is not installed here; ")
    return done.stdout


def test_a_bare_machine_trains_and_its_records_come_home_once(
    box: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bare(box, "-c", "import tqdm").returncode == 1, "the block works"
    place = "out=out/models/{0} record=out/records/{0}"
    teacher = stage(box, "train", "train.role=teacher", *place.format("teacher/resnet14").split())
    assert "teacher resnet14: test top-1" in teacher
    stage(box, "distill", "distill.method=simkd", *place.format("distill/resnet14-resnet8/simkd/0").split())
    stage(box, "distill", "distill.method=crd", "optim.lr=1e-3", *place.format("distill/resnet14-resnet8/crd/0").split())

    folders = record.find([box / "out"])
    assert [record.read(f)["status"] for f in folders] == ["FINISHED"] * 3
    assert [len(record.read_metrics(f)) for f in folders] == [1, 1, 2]
    for folder in folders:
        model = Path(str(folder).replace("records", "models"))
        net, meta = checkpoint.load(model)
        assert load_file(model / "predictions.safetensors")["deployed"].shape == (30, 10)
        assert net(torch.zeros(2, 3, 16, 16)).shape == (2, 10)
        assert record.read(folder)["outputs"]["model.safetensors"] == meta["sha256"]
    assert record.read(folders[0])["params"]["optim.lr"] == 0.001
    assert record.read(folders[0])["teacher"]["uid"] == record.read(folders[2])["uid"]

    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    assert tracking.sync([box / "out"], tmp_path, "pupil") == (3, 0, 0)
    assert tracking.sync([box / "out"], tmp_path, "pupil") == (0, 0, 3)
    store = tracking.connect(tmp_path, "pupil")
    runs = {run.data.tags["pupil.record"]: run for run in find_runs(store, "tags.`pupil.record` LIKE '%'")}
    assert len(runs) == 3
    for folder in folders:
        facts, run = record.read(folder), runs[record.read(folder)["uid"]]
        lines = record.read_metrics(folder)
        for key in lines[0]["values"]:
            history = store.client.get_metric_history(run.info.run_id, key)
            assert sorted((p.step, p.value) for p in history) == [(line["step"], line["values"][key]) for line in lines]
        assert run.data.metrics.items() >= facts["final"].items()
        assert (run.info.run_name, run.info.status) == (facts["name"], "FINISHED")
        assert {m.model_id for m in run.outputs.model_outputs}, "the deployed network is there too"


def test_a_mistake_is_one_line_there_too(box: Path) -> None:
    done = bare(box, str(ROOT / "stages/distill.py"), "--config", "box.json", "optim.lrr=1")
    assert done.returncode == 2
    assert done.stderr == "error: unknown key 'optim.lrr' in 'optim.lrr=1'; did you mean 'optim.lr'?\n"


def test_without_hydra_and_without_a_configuration_the_way_out_is_told(box: Path) -> None:
    done = bare(box, str(ROOT / "stages/train.py"), "optim.lr=1")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "--config" in line


def test_digits_without_scikit_learn_are_refused_in_one_line(box: Path) -> None:
    done = bare(box, str(ROOT / "stages/prepare.py"), "--config", "box.json", "out=other")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "scikit-learn" in line
    assert json.loads((box / "box.json").read_text())["data"]["name"] == "digits"
