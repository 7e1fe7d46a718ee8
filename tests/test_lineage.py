"""`python -m pupil why`: real small runs, their lineage, and the printed commands, which are run."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pupil.__main__  # noqa: F401  its names must exist before they are redirected
from pupil import lineage, record, session, tracking
from pupil.checkpoint import WEIGHTS
from pupil.record import sha256
from tests.inprocess import at_home, run

pytestmark = [
    pytest.mark.filterwarnings("ignore:::(mlflow|pydantic|sqlalchemy|alembic|google).*"),
    pytest.mark.filterwarnings("ignore:.*pupil.__main__.*:RuntimeWarning"),  # runpy runs it again, on purpose
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning"),  # sqlite connections that MLflow keeps until the end
]
PAGE = """
teachers: [resnet14]
students: [resnet8]
methods: [kd]
seeds: [0, 1]
data: {name: digits, image_size: 16, train_images: 40, val_images: 10, test_images: 20, pad: 1}
optim: {epochs: 1, batch_size: 20, lr: 0.05, milestones: [], schedule: cosine}
teacher:
  optim: {epochs: 1, batch_size: 20, lr: 0.05, milestones: [], schedule: cosine}
"""


class NoStream:
    """Nothing is mirrored while these train: what MLflow has of them, `sync` brings."""

    def __init__(self, *about: Any) -> None:
        pass

    def changed(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with data, a student, an SH-KD teacher under its head, and a student of that, all by hand."""
    root = tmp_path_factory.mktemp("trained") / "checkout"
    root.mkdir()
    (root / "params.yaml").write_text(PAGE)
    with pytest.MonkeyPatch.context() as patch:
        at_home(root, patch)
        quietly(patch)
        for line in (
            "prepare out=out/data record=out/records/prepare",
            "train train.role=student train.seed=1 out=out/models/student/resnet8/1 record=out/records/student/resnet8/1",
            "train train.role=shkd train.head_of=out/models/student/resnet8/1 out=out/models/shkd/x record=out/records/shkd/x",
            "distill distill.teacher=resnet14 distill.checkpoint=out/models/shkd/x distill.seed=1 optim.lr=0.03 hp.kd.T=3.0",
        ):
            assert run(line, patch) == 0, line
    return root


@pytest.fixture
def checkout(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "checkout"
    shutil.copytree(trained, root)
    at_home(root, monkeypatch)
    quietly(monkeypatch)
    return root


def quietly(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(session, "Stream", NoStream)
    patch.setattr("pupil.preparation.Stream", NoStream)


def distilled(root: Path) -> Path:
    (folder,) = root.glob("runs/distill-*")
    return folder


def told(text: str | Path) -> str:
    return "\n".join(lineage.why(str(text)))


def lines(text: str, label: str) -> list[str]:
    return re.findall(rf"^  {label} +(.*)$", text, re.MULTILINE)


def test_a_run_is_traced_to_data_teacher_and_the_lender_of_its_head(checkout: Path) -> None:
    text = told(distilled(checkout))
    heads = re.findall(r"^\S.*$", text, re.MULTILINE)
    assert heads == [
        "resnet8 by kd from resnet14 (SH-KD), seed 1",
        "teacher resnet14 under resnet8's classifier (SH-KD)",
        "prepare digits",
        "resnet8 alone, seed 1",
    ]
    facts = record.read(distilled(checkout) / "record")
    assert f"uid {facts['uid']}, FINISHED" in lines(text, "record")[0]
    assert f"test/top1 {facts['final']['test/top1']:.6g}" in lines(text, "metrics")[0]
    assert facts["outputs"][WEIGHTS] in lines(text, "model")[0]
    digest = json.loads((checkout / "out/data/manifest.json").read_text())["digest"]
    assert lines(text, "data")[0] == (f"digits from digits, seed 0, digest {digest}; prepared by out/records/prepare, below")
    assert sha256(checkout / "out/models/shkd/x" / WEIGHTS) in lines(text, "teacher")[0]
    assert lines(text, "head of") == [
        f"resnet8, sha256 {sha256(checkout / 'out/models/student/resnet8/1' / WEIGHTS)}: out/records/student/resnet8/1, below"
    ]
    assert "the code here is the same" in lines(text, "code")[0]
    assert lines(text, "typed")[0].startswith("distill.py distill.teacher=resnet14")
    assert lines(text, "differs") == [
        "optim.lr was 0.03, params.yaml here says 0.05",
        "hp.kd.T was 3.0, params.yaml here says 4.0",
    ]
    assert f"python {facts['environment']['python']}" in lines(text, "environment")[0]
    assert lines(text, "WARNING") == []


@pytest.mark.slow
@pytest.mark.parametrize("which", ["distilled", "shkd", "student", "prepare"])
def test_the_printed_command_gives_the_same_weights(checkout: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    folder = {
        "distilled": lambda: distilled(checkout),
        "shkd": lambda: checkout / "out/records/shkd/x",
        "student": lambda: checkout / "out/models/student/resnet8/1",
        "prepare": lambda: checkout / "out/records/prepare",
    }[which]()
    (command,) = lineage.why(str(folder), command_only=True)
    before = set(checkout.glob("runs/*"))
    words = command.removeprefix("python stages/").replace(".py", "", 1)
    assert words != command
    assert run(words, monkeypatch) == 0
    (new,) = set(checkout.glob("runs/*")) - before
    if which == "prepare":
        first, again = (json.loads((place / "manifest.json").read_text()) for place in (checkout / "out/data", new / "data"))
        assert again["digest"] == first["digest"]
        return
    old = lineage.find(str(folder), lineage.Records()).weights
    assert sha256(new / "model" / WEIGHTS) == old
    assert record.read(new / "record")["outputs"] == record.read(lineage.find(str(folder), lineage.Records()).folder)["outputs"]


@pytest.mark.slow
def test_a_teacher_that_was_moved_is_found_by_its_weights(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(checkout / "out/models/shkd", checkout / "runs/kept/models/shkd")
    shutil.copytree(checkout / "out/records/shkd", checkout / "runs/kept/records/shkd")
    (checkout / "out/models/shkd/x" / WEIGHTS).write_bytes(b"another")
    facts = record.read(checkout / "runs/kept/records/shkd/x")
    facts["model"] = "../../../models/shkd/x"
    facts["checksum"] = record.checksum(facts)
    (checkout / "runs/kept/records/shkd/x/record.json").write_text(json.dumps(facts))
    shutil.rmtree(checkout / "out/records/shkd")
    (command,) = lineage.why(str(distilled(checkout)), command_only=True)
    assert command.endswith("distill.checkpoint=runs/kept/models/shkd/x")
    before = set(checkout.glob("runs/distill-*"))
    old = sha256(distilled(checkout) / "model" / WEIGHTS)
    assert run(command.removeprefix("python stages/").replace(".py", "", 1), monkeypatch) == 0
    (new,) = set(checkout.glob("runs/distill-*")) - before
    assert sha256(new / "model" / WEIGHTS) == old


def test_a_run_is_found_by_all_its_names(checkout: Path) -> None:
    facts = record.read(distilled(checkout) / "record")
    expected = told(distilled(checkout))
    for name in (distilled(checkout) / "record", distilled(checkout) / "model", facts["uid"], facts["uid"][:9], facts["name"]):
        assert told(name) == expected
    (checkout / "reports").mkdir()
    relative = str((distilled(checkout) / "model").relative_to(checkout))
    rows = [{"family": "a row", "folder": relative}, {"family": "a row", "folder": "out/models/student/resnet8/1"}]
    (checkout / "reports/networks.json").write_text(json.dumps(rows))
    text = told("a row")
    assert lines(text, "note") == ["the first of 2 networks in this row; the others: out/models/student/resnet8/1"]
    assert "\n".join(line for line in text.splitlines() if not line.startswith("  note")) == expected


@pytest.mark.slow
def test_a_run_is_found_by_its_id_in_mlflow_and_fetched_if_it_is_nowhere_else(
    checkout: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(empty_store, checkout / "mlflow.db")
    assert tracking.sync([checkout / "runs", checkout / "out/records"], checkout, "pupil") == (4, 0, 0)
    facts, expected = record.read(distilled(checkout) / "record"), told(distilled(checkout))
    store = tracking.connect(checkout, "pupil")
    (run_there,) = store.client.search_runs([store.experiment], f"tags.`pupil.record` = '{facts['uid']}'")
    database = (checkout / "mlflow.db").read_bytes()
    assert told(run_there.info.run_id) == expected
    assert told(run_there.info.run_id[:12]) == expected
    assert (checkout / "mlflow.db").read_bytes() == database
    old = sha256(distilled(checkout) / "model" / WEIGHTS)
    shutil.rmtree(distilled(checkout))
    text = told(run_there.info.run_id)
    assert lines(text, "note") == ["its record is not on this machine; it was fetched from MLflow"]
    assert "is not there any more" in lines(text, "WARNING")[0]
    assert lines(text, "differs") == lines(expected, "differs")
    (command,) = lineage.why(run_there.info.run_id, command_only=True)
    assert run(command.removeprefix("python stages/").replace(".py", "", 1), monkeypatch) == 0
    assert sha256(distilled(checkout) / "model" / WEIGHTS) == old


def other_environment(**changes: Any) -> Callable[[str], dict[str, Any]]:
    real = record.environment
    return lambda device: {**real(device), **changes}


def test_what_differs_here_is_warned_of_in_a_line_each(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    then = record.read(distilled(checkout) / "record")["environment"]
    packages = {name: version for name, version in then["packages"].items() if name != "numpy"} | {"torch": "9.9.9"}
    changes = {"python": "3.99.1", "device": "NVIDIA H200", "processor": "an abacus", "threads": 64, "packages": packages}
    monkeypatch.setattr(record, "environment", other_environment(**changes))
    (checkout / "out/data/manifest.json").write_text("{}")
    (distilled(checkout) / "model" / WEIGHTS).write_bytes(b"other")
    first = told(distilled(checkout) / "record").split("\n\n")[0]
    assert lines(first, "WARNING") == [
        f"{distilled(checkout).relative_to(checkout)}/model holds other weights now",
        "out/data holds no data: prepare those of this run first",
        f"python: {then['python']} then, 3.99.1 here",
        "device: cpu then, NVIDIA H200 here",
        f"processor: {then['processor']} then, an abacus here",
        f"threads: {then['threads']} then, 64 here",
        f"numpy: {then['packages']['numpy']} then, none here",
        f"torch: {then['packages']['torch']} then, 9.9.9 here",
    ]


def test_another_code_is_fetched_from_git_and_what_no_commit_holds_is_named(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = distilled(checkout) / "record"
    facts = record.read(folder)
    facts["environment"] |= {"git_commit": "c" * 40, "git_dirty": True, "git_changed": ["params.yaml", "src/pupil/fit.py"]}
    (folder / "record.json").write_text(json.dumps(facts))
    here = told(folder).split("\n\n")[0]
    assert "git checkout" not in here
    assert "the code here is the same" in here
    assert lines(here, "WARNING") == [], "the digest says that these changes are here"
    monkeypatch.setattr(record, "code", lambda: "another")
    text = told(folder).split("\n\n")[0]
    assert lines(text, "code") == [
        f"commit {'c' * 40}, with uncommitted changes in params.yaml, src/pupil/fit.py; the code here is another"
    ]
    assert lines(text, "WARNING") == [
        f"commit {'c' * 40} is not in this repository; fetch it first",
        "the commit alone is not the code of this run: src/pupil/fit.py had changes that no commit holds",
    ]
    real = record.git
    monkeypatch.setattr(record, "git", lambda *args: "" if args[0] == "cat-file" else real(*args))
    (command,) = lineage.why(str(folder), command_only=True)
    assert command.startswith(f"git checkout {'c' * 40} && python stages/distill.py --config ")


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda root: None, "there is no run 'nothing': give the folder of a record or of a model"),
    "ffff": (lambda root: None, "there is no run 'ffff'"),
    "empty": (lambda root: (root / "empty").mkdir(), "empty holds neither record.json nor model.json"),
    "twice": (lambda root: twice(root), "'twice' means 2 runs; give the folder of one: "),
    "damaged": (lambda root: damaged(root), "damaged/record.json is damaged: it is not JSON; delete"),
    "orphan": (lambda root: orphan(root), "no record below out/records or runs left the weights in"),
}


def twice(root: Path) -> None:
    for name in "ab":
        record.Record(root / "runs" / name, {"stage": "train", "name": "twice", "params": {}})


def damaged(root: Path) -> None:
    (root / "damaged").mkdir()
    (root / "damaged/record.json").write_text("{")


def orphan(root: Path) -> None:
    shutil.copytree(distilled(root) / "model", root / "orphan")
    (root / "orphan" / WEIGHTS).write_bytes(b"nobody's")


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(
    name: str, checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, message = MISTAKES[name]
    spoil(checkout)
    capfd.readouterr()
    assert run(f"why {name}", monkeypatch) == 2
    out, err = capfd.readouterr()
    assert message in err
    assert (len(err.splitlines()), out) == (1, "")


def test_the_command_line_prints_the_lineage_and_the_command(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    place = str(distilled(checkout).relative_to(checkout))
    assert run(f"why {place}", monkeypatch) == 0
    out = capfd.readouterr().out
    assert out.strip() == told(place)
    assert run(f"why {place} --command", monkeypatch) == 0
    assert capfd.readouterr().out.strip() in out


def test_a_broken_page_of_settings_does_not_hide_the_lineage(checkout: Path) -> None:
    (checkout / "params.yaml").write_text("optim: {lr: fast}\n")
    text = told(distilled(checkout)).split("\n\n")[0]
    (line,) = lines(text, "WARNING")
    assert line.startswith("params.yaml here cannot be compared: optim.lr: expected a number")
    assert lines(text, "again")
