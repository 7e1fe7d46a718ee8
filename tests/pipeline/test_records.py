"""Every training has its run in MLflow, whatever was deleted, restored, fetched from elsewhere or trained at once."""

from pathlib import Path

import pytest

from tests.pipeline.conftest import Checkout, Done, curves_of, ran, runs_of

pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.filterwarnings("ignore:::(mlflow|pydantic|sqlalchemy|alembic|google).*"),
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning"),  # sqlite connections that MLflow keeps until the end
]


def test_every_training_has_a_complete_run_below_one_parent(finished: tuple[Checkout, Done]) -> None:
    clone, _ = finished
    runs = runs_of(clone)
    parents, children = [run for run in runs if run.parent is None], [run for run in runs if run.parent is not None]
    assert len(parents) == 1
    assert parents[0].status == "FINISHED"
    assert {run.parent for run in children} == {parents[0].id}
    stages = sorted(str(run.stage) for run in children)
    assert stages == ["distill"] * 4 + ["evaluate", "prepare", "train_student", "train_student", "train_teacher"]
    assert {run.uid for run in children} == set(clone.records())
    assert all(run.status == "FINISHED" for run in children)
    terms = {"kd": ("ce", "kl"), "simkd": ("knowledge",), None: ("ce",)}
    for run in (run for run in children if run.stage not in ("prepare", "evaluate")):
        method = run.params.get("method")
        prefix = "distil" if method else "train"
        per_epoch = {f"{prefix}/{term}" for term in terms[method]} | {f"{prefix}/raw/{term}" for term in terms[method]}
        per_epoch |= {f"{prefix}/loss", "lr", "val/top1", "val/nll", "images_per_second"}
        per_epoch |= {"system/cpu_utilization_percentage", "system/process_memory_megabytes"}
        assert per_epoch <= set(run.curves), run.name
        for key in per_epoch:
            assert [step for step, _ in run.curves[key]] == [1, 2], (run.name, key)
        for key in ("test/top1", "test/nll", "test/ece", "test/last/top1", "test/best_by_val/top1"):
            assert len(run.curves[key]) == 1
        assert {"network", "seed", "optim.lr", "optim.epochs", "data.name", "data.train_images"} <= set(run.params)
        (digest,) = run.digests
        assert (clone.path / "out" / "data" / "manifest.json").read_text().count(digest) == 1
        figures = {"learning_curves.png", "confusion_matrix.png", "mistakes.png"}
        assert figures | {"record.json", "config.json"} <= run.artifacts
        assert run.models == 1
        if method:
            assert f"hp.{'factor' if method == 'simkd' else 'kl'}" in run.params
    (report,) = (run for run in children if run.stage == "evaluate")
    assert {"table.md", "metrics.json", "networks.json", "comparison.png"} <= report.artifacts
    (data,) = (run for run in children if run.stage == "prepare")
    assert data.name == "prepare digits"
    assert {"report.txt", "report.json", "contact_sheet.png", "record.json"} <= data.artifacts
    assert {key: points[0][1] for key, points in data.curves.items() if key.startswith("images/")} == {
        "images/train": 40,
        "images/val": 20,
        "images/test": 60,
    }
    assert {"classes", "dropped", "duplicates/within/train", "duplicates/across/train-test"} <= set(data.curves)
    assert data.params["data.train_images"] == "40"
    assert data.digests == next(run for run in children if run.stage == "train_teacher").digests


def test_after_everything_is_deleted_dvcs_cache_restores_models_and_runs(
    workspace: Checkout, finished: tuple[Checkout, Done]
) -> None:
    expected = curves_of(finished[0])
    results = {name: (workspace.path / "reports" / name).read_text() for name in ("metrics.json", "table.md")}
    workspace.remove("out", "reports", "mlflow.db", "mlruns", "dvc.lock", "runs", ".work")
    done = workspace.run("python", "-m", "pupil", "pipeline")
    assert ran(done) == set()
    assert done.out.count("is cached - skipping run") == 9
    assert "nothing was trained" in done.out
    assert set(workspace.records()) == set(expected)
    assert curves_of(workspace) == expected
    assert {name: (workspace.path / "reports" / name).read_text() for name in results} == results
    runs = runs_of(workspace)
    assert {run.name for run in runs} == {run.name for run in runs_of(finished[0])}
    assert [run.models for run in runs if run.stage not in (None, "prepare", "evaluate")] == [1] * 7
    assert len([run for run in runs if run.parent is None]) == 1
    again = workspace.run("python", "-m", "pupil", "sync")
    assert "0 runs created, 0 completed, 9 were there" in again.out
    assert len(runs_of(workspace)) == len(runs)


def test_another_clone_fetches_results_and_runs_from_a_remote(
    workspace: Checkout, finished: tuple[Checkout, Done], tmp_path: Path
) -> None:
    workspace.run("dvc", "remote", "add", "-d", "shelf", str(tmp_path / "shelf"))
    workspace.commit("a remote")
    workspace.run("dvc", "push", "--run-cache")
    workspace.run("git", "clone", "-q", str(workspace.path), str(tmp_path / "other"))
    other = Checkout(tmp_path / "other")
    other.run("dvc", "pull", "--run-cache")
    done = other.run("python", "-m", "pupil", "pipeline")
    assert ran(done) == set()
    assert "nothing was trained" in done.out
    assert curves_of(other) == curves_of(finished[0])
    assert other.run("git", "status", "--porcelain").out == ""


def test_four_cells_at_once_on_a_new_store_lose_nothing(workspace: Checkout) -> None:
    workspace.edit({"optim.lr": 0.02})
    workspace.remove("mlflow.db", "mlruns")
    before = workspace.records()
    cells = [f"distill@resnet8-resnet8-{method}-{seed}" for method in ("kd", "simkd") for seed in (0, 1)]
    processes = [workspace.start("dvc", "repro", "-s", cell) for cell in cells]
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
        assert "WARNING" not in err
    new = {uid: facts for uid, facts in workspace.records().items() if uid not in before}
    assert len(new) == 4
    runs = runs_of(workspace)
    children = [run for run in runs if run.parent]
    assert len(runs) == 5
    assert {run.uid for run in children} == set(new)
    assert len({run.parent for run in children}) == 1
    for run in children:
        assert run.status == "FINISHED"
        assert run.params["optim.lr"] == "0.02"
        assert [step for step, _ in run.curves["val/top1"]] == [1, 2]
        assert "test/top1" in run.curves
        assert run.models == 1
    assert not workspace.out_of_date() & set(cells)
