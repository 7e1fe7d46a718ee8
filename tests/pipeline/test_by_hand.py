"""Single stages by hand, with Hydra's overrides, and the same through MLflow's projects."""

import re
import socket
from pathlib import Path

import pytest

from tests.pipeline.conftest import Checkout, Done, ran, runs_of

pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.filterwarnings("ignore:::(mlflow|pydantic|sqlalchemy|alembic|google).*"),
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning"),  # sqlite connections that MLflow keeps until the end
]


def mlflow_run(clone: Checkout, *more: str) -> Done:
    return clone.attempt("mlflow", "run", ".", "--env-manager", "local", "--experiment-name", "mine", *more)


def test_a_stage_by_hand_takes_overrides_and_sweeps_and_leaves_dvcs_outputs_alone(workspace: Checkout) -> None:
    before = workspace.records()
    workspace.run("python", "stages/distill.py", "distill.method=simkd", "optim.epochs=1")
    workspace.run("python", "stages/distill.py", "-m", "distill.method=kd,simkd", "optim.epochs=1")
    folders = list((workspace.path / "runs").glob("distill-*"))
    assert len(folders) == 3
    assert all((folder / "model" / "model.safetensors").exists() for folder in folders)
    assert workspace.out_of_date() == set()
    assert workspace.run("git", "status", "--porcelain").out == ""
    new = {uid: facts for uid, facts in workspace.records().items() if uid not in before}
    runs = runs_of(workspace)
    assert {run.uid for run in runs} == set(new)
    assert all(run.status == "FINISHED" and run.parent is None for run in runs)
    assert sorted(run.params["method"] for run in runs) == ["kd", "simkd", "simkd"]
    assert all(run.params["optim.epochs"] == "1" and len(run.curves["val/top1"]) == 1 for run in runs)


def test_mlflow_run_of_one_stage_is_the_parent_of_what_it_trained(workspace: Checkout) -> None:
    workspace.edit({"optim.epochs": 1})
    for overrides in (["-P", "overrides=distill.method=simkd optim.lr=0.01"], []):
        done = mlflow_run(workspace, "-e", "distill", *overrides)
        assert done.status == 0, done.text
    runs = runs_of(workspace, "mine")
    assert len(runs) == 4
    parents = [run for run in runs if run.parent is None]
    for parent in parents:
        (child,) = (run for run in runs if run.parent == parent.id)
        assert (parent.status, child.status, child.stage) == ("FINISHED", "FINISHED", "distill")
    trained = {(run.params["method"], run.params["optim.lr"]) for run in runs if run.parent}
    assert trained == {("simkd", "0.01"), ("kd", "0.05")}
    assert runs_of(workspace) == []


def test_mlflow_run_of_the_project_is_one_parent_with_a_child_per_network(workspace: Checkout) -> None:
    workspace.edit({"data.seed": 1, "seeds": [0], "methods": ["kd"], "optim.epochs": 1, "teacher.optim.epochs": 1})
    workspace.remove("out", "reports")  # or the records of before would be synced as well
    done = mlflow_run(workspace)
    assert done.status == 0, done.text
    assert len(ran(done)) == 5
    assert "3 networks were trained now" in done.text
    runs = runs_of(workspace, "mine")
    (parent,) = (run for run in runs if run.parent is None)
    children = [run for run in runs if run.parent == parent.id]
    assert (parent.status, len(runs)) == ("FINISHED", 1 + len(children))
    assert {run.uid for run in children} == set(workspace.records())
    assert sorted(str(run.stage) for run in children) == ["distill", "evaluate", "prepare", "train_student", "train_teacher"]


@pytest.mark.parametrize("hostile", ["optim.epochs=1; touch hacked", "$(touch hacked)", "x' ; touch hacked '"])
def test_nothing_in_overrides_reaches_a_shell(hostile: str, workspace: Checkout) -> None:
    before = workspace.records()
    done = mlflow_run(workspace, "-e", "distill", "-P", f"overrides={hostile}")
    assert done.status != 0
    assert len([line for line in done.text.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in done.text
    assert not list(workspace.path.rglob("hacked"))
    assert workspace.records() == before


def test_a_tracking_server_that_is_dead_costs_seconds_and_the_run_can_be_synced_later(workspace: Checkout) -> None:
    command = ("python", "stages/distill.py", "optim.epochs=1")
    normal = workspace.run(*command)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    done = workspace.run(*command, MLFLOW_TRACKING_URI=f"http://127.0.0.1:{port}")
    assert done.seconds < normal.seconds + 15
    assert len(re.findall("^WARNING", done.text, re.MULTILINE)) == 1
    assert "python -m pupil sync" in done.err
    assert "Traceback" not in done.text
    by_hand = {facts["uid"] for facts in workspace.records().values() if facts["group"] is None}
    assert len({run.uid for run in runs_of(workspace)} & by_hand) == 1
    workspace.run("python", "-m", "pupil", "sync", str(Path("runs")))
    runs = [run for run in runs_of(workspace) if run.uid in by_hand]
    assert {run.uid for run in runs} == by_hand
    assert len(by_hand) == 2
    first, second = ({k: v for k, v in run.curves.items() if k.startswith(("distil/", "val/", "test/"))} for run in runs)
    assert first == second  # the same seed: the same numbers
