"""Values that want to be commands stay values; what is written holds no pickle and no secret; what is served, only here."""

import io
import json
import os
import pickle
import random
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from mlflow.projects import _project_spec
from torchvision import datasets

import pupil.__main__  # noqa: F401  its names must exist before they are redirected
from pupil import points
from pupil.config import words
from pupil.data import Data, prepare
from pupil.tracking.store import without_password
from pupil.types import UserError
from tests.inprocess import at_home, run
from tests.pickles import length, pickles
from tests.test_data import fake_cifar
from tests.test_mistakes import PAGE
from tests.test_sources import no_network

pytestmark = [
    pytest.mark.filterwarnings("ignore:::(mlflow|pydantic|sqlalchemy|alembic|google).*"),
    pytest.mark.filterwarnings("ignore:.*pupil.__main__.*:RuntimeWarning"),  # runpy runs it again, on purpose
]
ROOT = Path(__file__).resolve().parents[1]
HOSTILE = [
    "$(touch hacked)",
    "`touch hacked`",
    "; touch hacked",
    "x; touch hacked #",
    "&& touch hacked",
    "| touch hacked",
    "x & touch hacked",
    "'; touch hacked; '",
    '"; touch hacked; "',
    "a\ntouch hacked\nb",
    "x > hacked",
    "\\$(touch hacked)",
    "$IFS;touch$IFS'hacked'",
]
NAMES = [
    entry for entry, facts in yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"].items() if "parameters" in facts
]
STUB = """#!/bin/sh
for word in "$@"; do printf '%s\\0' "$word"; done > "$SEEN"
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout/params.yaml").write_text(PAGE)
    at_home(tmp_path / "checkout", monkeypatch)
    return tmp_path / "checkout"


# --- MLproject and --overrides --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", NAMES)
def test_mlflow_hands_every_override_on_as_one_word(entry: str, tmp_path: Path) -> None:
    """The command that MLflow makes, run by bash as MLflow runs it, with a `python` that writes down what it is given."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(STUB)
    (tmp_path / "bin/python").chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "SEEN": str(tmp_path / "seen")}
    project = _project_spec.load_project(str(ROOT))
    for value in [*HOSTILE, "", "a b", "optim.lr=1 optim.epochs=2"]:
        command = project.get_entry_point(entry).compute_command({"overrides": value}, None)
        subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=True)
        *_, mark, given = (tmp_path / "seen").read_text().split("\0")[:-1]
        assert (mark, given) == ("--overrides", value)
        assert not (tmp_path / "hacked").exists()


def test_no_entry_point_evaluates_its_parameters() -> None:
    for facts in yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"].values():
        assert not re.search(r"\beval\b|\bsh -c|[`$]", facts["command"])
        for parameter in facts.get("parameters", {}):
            assert re.search(rf"(?<!['\"]){{{parameter}}}(?!['\"])", facts["command"]), (
                "MLflow quotes; quotes around would undo it"
            )


@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_value_of_an_override_stays_a_value(
    value: str, checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    quoted = "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"  # Hydra's quotes
    typed = shlex.join(["--overrides", shlex.quote(f"experiment={quoted}")])
    assert words(shlex.split(typed)) == [f"experiment={quoted}"]
    status = run(f"resolve {shlex.quote(f'experiment={quoted}')}", monkeypatch)
    out, err = capfd.readouterr()
    if "\\$" in value or value.count("\\"):
        assert status == 0 or err.count("\n") == 1
    else:
        assert status == 0, err
        assert json.loads(out)["experiment"] == value
    (checkout / "box.json").write_text(out if status == 0 else "{}")
    run(f"train --config box.json {shlex.quote(f'experiment={value}')} prepared=nowhere", monkeypatch)
    assert "no prepared data in nowhere" in capfd.readouterr().err
    assert not list(checkout.rglob("hacked"))


@pytest.mark.parametrize("key", ["teachers", "students", "methods", "shkd"])
def test_a_hostile_name_is_refused_before_dvc_sees_it(
    key: str, checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`python -m pupil pipeline` checks the page and then starts dvc, which is not reached."""
    page = (checkout / "params.yaml").read_text()
    for name in [*HOSTILE, "../../../runs", "-rf", "networks/a;b.py:net"]:
        tree = {**yaml.safe_load(page), key: [name]}
        (checkout / "params.yaml").write_text(yaml.safe_dump(tree))
        assert run("pipeline", monkeypatch) == 2
        err = capfd.readouterr().err
        assert err.startswith(f"error: {key}: {' '.join(repr(name).split())} is no plain name"), err
        assert err.count("\n") == 1
    assert sorted(p.name for p in checkout.iterdir()) == ["params.yaml"]


# --- dvc.yaml -------------------------------------------------------------------------------------------------------------


def dvc_run(root: Path, names: list[str], gate: bool) -> str:
    """DVC with our commands for teachers of these names; what it said."""
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["train_teacher"]
    ours = {"matrix": stage["matrix"], "cmd": stage["cmd"] if gate else stage["cmd"][-1]}
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"train_teacher": ours}}))
    (root / "params.yaml").write_text(yaml.safe_dump({"teachers": names}))
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(root.parent / "site")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["dvc", "repro", "-k"], cwd=root, env=environment, text=True, capture_output=True, timeout=200)
    return done.stdout + done.stderr


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """Our stage with a training that only says that it was started."""
    root = tmp_path / "pipeline"
    (root / "src/pupil").mkdir(parents=True)
    (root / "stages").mkdir()
    for name in ("src/pupil/__init__.py", "src/pupil/names.py", "stages/names.py"):
        shutil.copy(ROOT / name, root / name)
    (root / "stages/train.py").write_text("open('trained', 'w').close()\n")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    (root / ".dvc").mkdir()
    (root / ".dvc/config").touch()
    return root


def test_dvc_runs_no_command_out_of_a_name(pipeline: Path) -> None:
    for name in HOSTILE:
        if "/" not in name and "\n" not in name:  # DVC itself refuses those in the name of a stage
            said = dvc_run(pipeline, [name], gate=True)
            assert "is no plain name; letters, digits" in said, said
    said = dvc_run(pipeline, HOSTILE, gate=True)
    assert not (pipeline / "hacked").exists(), said
    assert not (pipeline / "trained").exists()
    dvc_run(pipeline, ["wrn_16_1", "timm/vit_tiny_patch16_224.augreg", "networks/mine.py:tiny"], gate=True)
    assert (pipeline / "trained").exists(), "real names pass"


def test_without_the_look_at_names_dvc_would_run_them(pipeline: Path) -> None:
    dvc_run(pipeline, ["x; touch hacked #"], gate=False)
    assert (pipeline / "hacked").exists()


# --- the UI, the lock, the audit ------------------------------------------------------------------------------------------


def made(*words: str) -> str:
    """What make would do."""
    return subprocess.run(["make", "-n", *words], cwd=ROOT, text=True, capture_output=True, check=True).stdout


def test_the_ui_is_served_to_this_machine_alone() -> None:
    (line,) = (line for line in made("ui", "PORT=5001").replace("\\\n", "").splitlines() if "mlflow server" in line)
    arguments = shlex.split(line)
    assert arguments[arguments.index("--host") + 1] == "127.0.0.1"
    assert arguments[arguments.index("--port") + 1] == "5001"
    others = [
        path for path in (ROOT / "Makefile", ROOT / "README.md", *ROOT.glob("docs/*.md")) if "0.0.0.0" in path.read_text()
    ]
    assert others == []


def test_every_locked_package_has_its_hashes_and_is_installed_by_them() -> None:
    text = (ROOT / "requirements.txt").read_text()
    blocks = re.split(r"\n(?=[a-zA-Z0-9])", text.strip())
    assert len(blocks) > 100
    for block in blocks:
        assert re.match(r"[\w.\[\],-]+==\S+ \\\n", block), block[:60]
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block[:60]
    assert "--require-hashes requirements.txt" in (ROOT / "Makefile").read_text()
    direct = re.findall(r"^([\w-]+)", (ROOT / "requirements.in").read_text(), re.MULTILINE)
    assert {name.lower() for name in direct} <= {re.split(r"==|\[", block)[0].lower() for block in blocks}


# --- downloads ------------------------------------------------------------------------------------------------------------


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("part", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_cifar_file_that_is_not_the_authors_is_not_opened(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR's files are pickles: they are opened only if their checksums are the published ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    fake_cifar(tmp_path / "home", datasets.CIFAR10, monkeypatch)
    config = Data(name="cifar10", path=str(tmp_path / "home"), train_images=50)
    prepare(config, tmp_path / "out")
    (tmp_path / "home" / datasets.CIFAR10.base_folder / part).write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UserError, match=r"cifar10 is not in .* or is damaged") as caught:
        prepare(config, tmp_path / "again")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "hacked").exists()
    assert not (tmp_path / "again").exists()


class Answer(io.BytesIO):
    """What a server sends."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(raw)
        self.length, self.headers, self.url = len(raw), {"Content-Length": str(len(raw))}, "https://example.org/x"

    def getheader(self, name: str, default: str | None = None) -> str | None:
        return self.headers.get(name, default)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist"])
def test_a_download_that_is_not_what_was_published_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        raw = pickle.dumps(Harmful())
        info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        info.size = len(raw)
        archive.addfile(info, io.BytesIO(raw))

    def answer(request: object, *args: object, **kwargs: object) -> Answer:
        asked.append(getattr(request, "full_url", str(request)))
        return Answer(packed.getvalue())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", answer)
    with pytest.raises(UserError, match="could not be downloaded") as caught:
        prepare(Data(name=name, path=str(tmp_path / "home")), tmp_path / "out")
    assert asked, "it was downloaded"
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "hacked").exists()
    assert not list((tmp_path / "home").rglob("data_batch_1")), "nothing was unpacked"
    assert not (tmp_path / "out").exists()


# --- pickles and secrets --------------------------------------------------------------------------------------------------


def test_points_to_go_on_from_hold_no_pickle(tmp_path: Path) -> None:
    points.write(
        tmp_path / "point.safetensors", {"weights": {"a": torch.randn(300, 300)}, "epoch": 3, "lists": [1, [2.5, None]]}
    )
    assert list(pickles("point.safetensors", (tmp_path / "point.safetensors").read_bytes())) == []


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_would_be_found_wherever_it_is(protocol: int, tmp_path: Path) -> None:
    raw = pickle.dumps({"weights": [1.5, 2.5], "name": "x", "who": Path("x")}, protocol)
    assert list(pickles("a", raw))
    torch.save({"w": torch.zeros(3)}, tmp_path / "a")
    assert list(pickles("a", (tmp_path / "a").read_bytes()))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("data", raw)
    assert list(pickles("a", packed.getvalue()))
    if protocol >= 2:
        assert list(pickles("a", b"SQLite format 3\0" + bytes(500) + raw + bytes(500)))


def test_numbers_are_not_taken_for_pickles() -> None:
    noise = random.Random(0).randbytes(1 << 21)
    assert list(pickles("a", noise)) == []
    assert length(b'{"a": 1}\n') == 0


@pytest.mark.parametrize(
    "text", ["http://me:se@cret@host/x", "postgresql://me:se:cret@host:1/db", "https://:secret@host", "see //secret@x and //y"]
)
def test_a_password_in_an_address_is_not_told(text: str) -> None:
    assert "cret" not in without_password(text)
