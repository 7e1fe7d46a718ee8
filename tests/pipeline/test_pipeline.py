"""The pipeline as DVC sees it: what runs, what does not, and what the reports say."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.conftest import Checkout, Done, copy, ran, runs_of

pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.filterwarnings("ignore:::(mlflow|pydantic|sqlalchemy|alembic|google).*"),
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning"),  # sqlite connections that MLflow keeps until the end
]
TEACHER = {"train_teacher@resnet8"}
ALONE = {"train_student@resnet8-0", "train_student@resnet8-1"}
KD = {"distill@resnet8-resnet8-kd-0", "distill@resnet8-resnet8-kd-1"}
SIMKD = {"distill@resnet8-resnet8-simkd-0", "distill@resnet8-resnet8-simkd-1"}
EVERYTHING = {"prepare", *TEACHER, *ALONE, *KD, *SIMKD, "evaluate"}


def test_dvc_repro_runs_every_stage_from_nothing(finished: tuple[Checkout, Done]) -> None:
    clone, first = finished
    assert ran(first) == EVERYTHING
    assert "WARNING" not in first.text
    assert "Traceback" not in first.text
    assert clone.run("git", "status", "--porcelain").out == ""


def test_a_second_run_does_nothing_and_says_so(finished: tuple[Checkout, Done]) -> None:
    clone, _ = finished
    before = clone.records()
    second = clone.run("dvc", "repro")
    assert ran(second) == set()
    assert "Data and pipelines are up to date." in second.out
    third = clone.run("python", "-m", "pupil", "pipeline")
    assert ran(third) == set()
    assert "nothing was trained" in third.out
    assert "0 runs created, 0 completed, 9 were there" in third.out
    assert (clone.path / "reports" / "table.md").read_text() in third.out
    assert clone.records() == before
    assert clone.run("git", "status", "--porcelain").out == ""


def test_dvc_shows_the_graph_the_metrics_and_what_changed_in_them(workspace: Checkout) -> None:
    assert "train_teacher@resnet8" in workspace.run("dvc", "dag").out
    shown = json.loads(workspace.run("dvc", "metrics", "show", "--json").out)[""]["data"]["reports/metrics.json"]["data"]
    assert set(shown) == {"resnet8", "resnet8 alone", "resnet8 by kd from resnet8", "resnet8 by simkd from resnet8"}
    assert shown["resnet8 by kd from resnet8"]["verdict"] in ("BEATS", "TIES", "LOSES")
    path = workspace.path / "reports" / "metrics.json"
    shown["resnet8 by kd from resnet8"] |= {"top1": -1.0, "verdict": "EATS"}
    path.write_text(json.dumps(shown))
    changed = workspace.run("dvc", "metrics", "diff")
    rows = {line.split("  ")[1].strip() for line in changed.out.splitlines()[1:]}
    assert rows == {"resnet8 by kd from resnet8.top1", "resnet8 by kd from resnet8.verdict"}
    assert "ERROR" not in changed.text


def test_the_plots_show_every_seed_of_every_network(workspace: Checkout) -> None:
    workspace.run("dvc", "plots", "show")
    page = (workspace.path / "dvc_plots" / "index.html").read_text()
    accuracy, per_class = (json.loads(spec) for spec in re.findall(r"var spec = (\{.*\});", page))
    assert len(accuracy["data"]["values"]) == 7
    assert len(per_class["data"]["values"]) == 7 * 10
    for spec, y in ((accuracy, "network"), (per_class, "class")):
        encoding = spec["encoding"]
        assert (encoding["y"]["field"], encoding["y"]["type"]) == (y, "nominal")  # names on a number axis are not drawn
        assert spec["mark"]["type"] == "point"  # bars of one name would be stacked
        for row in spec["data"]["values"]:
            assert 0 <= float(row[encoding["x"]["field"]]) <= 100
            assert row[encoding["color"]["field"]].startswith("resnet8")


def touch(name: str) -> Any:
    def change(clone: Checkout) -> None:
        path = clone.path / name
        path.parent.mkdir(exist_ok=True)
        with open(path, "a") as f:
            f.write("\n# a remark\n")

    return change


def edit(key: str, value: Any) -> Any:
    return lambda clone: clone.edit({key: value})


def leave_bytecode(clone: Checkout) -> None:
    for cache in (clone.path / "src").rglob("__pycache__"):
        shutil.rmtree(cache)
    for folder in ("data", "models", "methods"):
        (clone.path / "src" / "pupil" / folder / "__pycache__").mkdir()
        (clone.path / "src" / "pupil" / folder / "__pycache__" / "x.cpython-311.pyc").write_bytes(b"x")


TRAININGS = TEACHER | ALONE | KD | SIMKD


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(edit("hp.simkd.factor", 4), SIMKD, id="a knob of simkd"),
        pytest.param(edit("hp.kd.T", 2.0), KD, id="a knob of kd"),
        pytest.param(touch("src/pupil/methods/simkd.py"), SIMKD, id="simkd.py"),
        pytest.param(touch("src/pupil/methods/kd.py"), KD | SIMKD, id="what wrappers wrap, by hp.ls.of"),
        pytest.param(touch("src/pupil/methods/crd.py"), set(), id="a method that is not configured"),
        pytest.param(edit("hp.crd.dim", 64), set(), id="a knob of a method that is not configured"),
        pytest.param(touch("src/pupil/methods/base.py"), TRAININGS, id="what methods share"),
        pytest.param(touch("src/pupil/fit.py"), TRAININGS, id="the loop"),
        pytest.param(edit("teacher.optim.lr", 0.01), TEACHER | KD | SIMKD, id="the teacher's recipe"),
        pytest.param(edit("teacher.seed", 1), TEACHER | KD | SIMKD, id="the teacher's seed"),
        pytest.param(edit("optim.lr", 0.01), ALONE | KD | SIMKD, id="the students' recipe"),
        pytest.param(edit("protocol.deploy", "best_by_val"), TRAININGS, id="the protocol"),
        pytest.param(edit("data.seed", 1), {"prepare"} | TRAININGS, id="the data"),
        pytest.param(touch("requirements.txt"), {"prepare"} | TRAININGS, id="the packages"),
        pytest.param(touch("src/pupil/report.py"), {"evaluate"}, id="the report"),
        pytest.param(edit("device", "cpu"), set(), id="the device"),
        pytest.param(edit("experiment", "another"), set(), id="the experiment's name"),
        pytest.param(touch("src/pupil/tracking/mirror.py"), set(), id="the tracking"),
        pytest.param(touch("README.md"), set(), id="the manual"),
        pytest.param(touch("tests/test_new.py"), set(), id="a test"),
        pytest.param(leave_bytecode, set(), id="bytecode"),
    ],
)
def test_a_change_reaches_exactly_what_depends_on_it(
    change: Any, expected: set[str], workspace: Checkout, downstream: dict[str, set[str]]
) -> None:
    change(workspace)
    direct = workspace.out_of_date()
    affected = direct.union(*(downstream[stage] for stage in direct))
    assert affected == expected | ({"evaluate"} if expected else set())


def test_a_knob_of_one_method_retrains_that_method_alone_and_turning_it_back_trains_nothing(workspace: Checkout) -> None:
    workspace.edit({"hp.simkd.factor": 4, "seeds": [0]})
    assert ran(workspace.run("dvc", "repro")) == {"distill@resnet8-resnet8-simkd-0", "evaluate"}
    workspace.edit({"hp.simkd": {"preset": "default"}, "seeds": [0, 1]})
    back = workspace.run("dvc", "repro")
    assert ran(back) == set()
    assert "is cached - skipping run" in back.out
    assert workspace.run("git", "status", "--porcelain", "dvc.lock", "reports").out == ""


def test_dvc_exp_run_takes_overrides(workspace: Checkout) -> None:
    workspace.edit({"seeds": [0]})
    workspace.commit("one seed")
    done = workspace.run("dvc", "exp", "run", "-n", "faster", "-S", "methods=[simkd]", "-S", "optim.lr=0.1")
    assert ran(done) == {"train_student@resnet8-0", "distill@resnet8-resnet8-simkd-0", "evaluate"}
    trained = [run for run in runs_of(workspace) if run.stage in ("train_student", "distill")]
    assert [run.params["optim.lr"] for run in trained] == ["0.1", "0.1"]
    assert len({run.parent for run in trained}) == 1
    assert "faster" in workspace.run("dvc", "exp", "list", "--name-only").out
    assert "resnet8 by simkd from resnet8" in (workspace.path / "reports" / "table.md").read_text()
    assert " by kd" not in (workspace.path / "reports" / "table.md").read_text()


def test_one_override_adds_a_teacher_under_the_students_classifier_and_both_are_compared(workspace: Checkout) -> None:
    assert not any("shkd" in stage or "retrain" in stage for stage in EVERYTHING)  # off by default: see the first test
    workspace.edit({"seeds": [0], "methods": ["simkd"]})
    workspace.commit("one seed, one method")
    done = workspace.run("dvc", "exp", "run", "-S", "shkd=[resnet8]")
    assert ran(done) == {"retrain_teacher@resnet8-resnet8", "distill_shkd@resnet8-resnet8-simkd-0", "evaluate"}
    table = (workspace.path / "reports" / "table.md").read_text()
    names = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][1:]
    assert names == [
        "resnet8",
        "resnet8 (SH-KD, resnet8)",
        "resnet8 alone",
        "resnet8 by simkd from resnet8",
        "resnet8 by simkd from resnet8 (SH-KD)",
    ]
    metrics = {key for run in runs_of(workspace) if run.stage == "evaluate" for key in run.curves}
    assert {f"{name}/top1_mean" for name in names} == {
        key.replace("SH-KD resnet8", "(SH-KD, resnet8)").replace("from resnet8 SH-KD", "from resnet8 (SH-KD)")
        for key in metrics
        if key.endswith("/top1_mean")
    }


@pytest.mark.parametrize("command", ["python -m pupil pipeline", "python -m pupil check", "dvc repro"])
def test_a_method_that_does_not_exist_is_one_line_before_anything_is_trained(
    command: str, start: Checkout, tmp_path: Path
) -> None:
    clone = copy(start, tmp_path / "pupil")
    clone.edit({"methods": ["kd", "simkdd"]})
    done = clone.attempt(*command.split())
    assert done.status != 0
    errors = [line for line in done.text.splitlines() if line.startswith("error: ")]
    assert errors == ["error: methods: there is no 'simkdd'; did you mean 'simkd'?"]
    assert "Traceback" not in done.text
    assert clone.records() == {}
    assert not (clone.path / "out" / "data").exists()
