"""What is wrong around a command: packages, Python, disks, stores, files from elsewhere.  One clear line, status 2."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import pupil.__main__  # noqa: F401  its names must exist before they are redirected
from pupil import checkpoint, driver
from pupil.models import build
from tests.environment import NAMESPACES
from tests.inprocess import at_home, run
from tests.test_bare import BLOCK, LACKING
from tests.test_doctor import two_dalis
from tests.test_mistakes import PAGE, tree

pytestmark = [
    pytest.mark.filterwarnings("ignore:::(mlflow|pydantic|sqlalchemy|alembic|google).*"),
    pytest.mark.filterwarnings("ignore:.*pupil.__main__.*:RuntimeWarning"),  # runpy runs it again, on purpose
]
ROOT = Path(__file__).resolve().parents[1]
MODEL = {"network": "resnet8", "method": None, "surgery": {}, "classes": [*"0123456789"], "image_size": 16}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page of settings, a model folder and a checkpoint; the working folder and the home of `pupil`."""
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "params.yaml").write_text(PAGE)
    checkpoint.save(root / "model", build("resnet8", 10).state_dict(), {**MODEL, "mean": [0.5] * 3, "std": [0.2] * 3})
    torch.save({"model": build("resnet8", 10).state_dict(), "best_acc": 0.5}, root / "a.pth")
    at_home(root, monkeypatch)
    return root


@pytest.fixture
def refused(checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must be refused; its line."""

    def refused(line: str) -> str:
        before = tree(checkout)
        status = run(line, monkeypatch)
        err = capfd.readouterr().err
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err
        assert status == 2
        left = {name: facts for name, facts in tree(checkout).items() if not name.startswith(".work")}  # the store's lock
        assert left == before
        return err

    return refused


def start(root: Path, *command: str, before: str = "", **more: str) -> "subprocess.CompletedProcess[str]":
    """A command in a process of its own."""
    words = " ".join((sys.executable, *command))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **more}
    return subprocess.run(
        ["bash", "-c", f"{before} exec {words}"], cwd=root, env=environment, text=True, capture_output=True, timeout=200
    )


def one_line(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


# --- Python and packages ------------------------------------------------------------------------------------------------

OLD = sorted({p for v in ("3.6", "3.8", "3.9", "3.10") for p in Path.home().glob(f".pyenv/versions/{v}.*/bin/python")})
ENTRIES = ["-m pupil doctor", f"{ROOT}/stages/train.py optim.lr=1"]


@pytest.mark.parametrize("entry", ENTRIES, ids=["pupil", "stage"])
def test_an_old_python_is_named(entry: str, tmp_path: Path) -> None:
    """The real ones that this machine has, and this one under a false name."""
    false = f"import sys, runpy; sys.version_info = (3, 9, 0); sys.path.insert(0, {str(ROOT / 'src')!r}); import pupil"
    done = [subprocess.run([sys.executable, "-c", false], capture_output=True, text=True)]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    for python in OLD:
        command = [str(python), *entry.split()]
        done.append(subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment))
    for one in done:
        assert "pupil needs Python 3.11 or newer" in one_line(one)
        assert "make setup" in one.stderr


@pytest.mark.parametrize("entry", ["-m pupil check", *ENTRIES[1:]], ids=["pupil", "stage"])
def test_a_missing_torch_is_named(entry: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCK.replace(repr(LACKING), repr(("torch", "safetensors"))))
    done = start(tmp_path, *entry.split(), PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT / 'src'}")
    assert "torch, safetensors cannot be found by " in one_line(done)
    assert "python -m pupil doctor" in done.stderr


@pytest.mark.parametrize(
    ("package", "line", "said"),
    [
        ("omegaconf", "sync", "omegaconf is not installed here: `make setup`"),
        ("hydra", "resolve", "give --config FILE.json first"),
        ("yaml", "recipe simkd/cifar100/resnet32x4-resnet8x4", "yaml is not installed here"),
        ("mlflow", "sync", "MLflow cannot be used here"),
        ("timm", "check students=[timm/vit_tiny_patch16_224]", "pip install timm"),
    ],
)
def test_a_missing_package_is_named(
    package: str, line: str, said: str, checkout: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "recipes", checkout / "recipes")
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert said in refused(line)


def test_two_dali_packages_are_named(refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_dalis(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    said = "loader: nvidia-dali-cuda110 and nvidia-dali-cuda120 overwrite one another's files"
    assert said in refused("train loader=dali")


def test_a_gpu_that_torch_does_not_see_is_not_passed_over_in_silence(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    monkeypatch.setattr(driver, "DEVICES", tmp_path / "dev")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    text = refused("check")
    assert f"device: nvidia0 is here, but torch {torch.__version__} sees no GPU; python -m pupil doctor says why" in text
    assert "device=cpu" in text
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run("check", monkeypatch) == 0, "hidden on purpose"


# --- git and dvc --------------------------------------------------------------------------------------------------------


def test_a_missing_dvc_is_named(refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "the command dvc is not on the PATH: `make setup`" in refused("pipeline")


def test_without_git_a_record_has_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    assert run("prepare out=data record=log", monkeypatch) == 0
    facts = json.loads((checkout / "log/record.json").read_text())
    assert (facts["status"], facts["environment"]["git_commit"]) == ("FINISHED", None)


# --- disks --------------------------------------------------------------------------------------------------------------

BELOW_A_FILE = [
    "prepare out=params.yaml/data record=log",
    "prepare out=data record=params.yaml/log",
    "import a.pth --arch resnet8 --data cifar10 --out params.yaml/model",
    "export model params.yaml/out",
]


@pytest.mark.parametrize("line", BELOW_A_FILE)
def test_a_folder_below_a_file_cannot_be_written(line: str, refused: Callable[..., str]) -> None:
    assert "Not a directory; give another path" in refused(line)


@pytest.mark.skipif(not NAMESPACES, reason="no mounts of one's own here")
@pytest.mark.parametrize(
    ("command", "said"),
    [
        (f"{ROOT}/stages/prepare.py --config box.json out=data record=log", "Read-only file system; give another folder"),
        ("-m pupil import a.pth --arch resnet8 --data cifar10 --out new", "Read-only file system; give another folder"),
    ],
)  # fmt: skip
def test_a_read_only_checkout(command: str, said: str, checkout: Path) -> None:
    """Mounted for real."""
    write_box(checkout)
    before = tree(checkout)
    mount = f"mount --bind {checkout} {checkout} && mount -o remount,ro,bind {checkout} && cd {checkout} &&"
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", f"{mount} exec {sys.executable} {command}"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        text=True,
        capture_output=True,
    )
    assert said in one_line(done)
    assert tree(checkout) == before


def write_box(root: Path) -> None:
    from pupil import config, settings

    tree = settings.plain(config.load_settings())
    (root / "box.json").write_text(json.dumps({key: value for key, value in tree.items() if key != "given"}))


@pytest.mark.parametrize("blocks", [1, 40])
def test_a_disk_that_fills_while_something_is_written(blocks: int, checkout: Path) -> None:
    """A limit on the size of files stops every write beyond it, as a full disk does."""
    write_box(checkout)
    before = tree(checkout)
    done = start(
        checkout, "-m", "pupil", "import", "a.pth", "--arch resnet8 --data cifar10 --out new", before=f"ulimit -f {blocks};"
    )
    assert "File too large; make room (`python -m pupil doctor` shows the disks), then give the same command again" in one_line(
        done
    )
    assert {name for name in tree(checkout) if name not in before} <= {"new"}, "an empty folder at most"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


# --- the tracking store -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uri", ["mlruns", "./mlruns", "file:mlruns"])
def test_a_store_of_files_is_refused(uri: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    text = refused("sync")
    assert "cannot be used: " in text
    assert "mlruns" in text


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_database_is_named(content: bytes, checkout: Path, refused: Callable[..., str]) -> None:
    (checkout / "mlflow.db").write_bytes(content)
    assert f"the tracking store sqlite:///{checkout}/mlflow.db cannot be used: " in refused("sync")


# --- commands with nonsense -----------------------------------------------------------------------------------------------

NONSENSE = [
    ("explain simkt", "there is no method 'simkt'; did you mean 'simkd'?"),
    ("explain", "one of the arguments method --markdown is required"),
    ("explain kd --markdown", "not allowed with argument"),
    ("frobnicate", "invalid choice: 'frobnicate'"),
    ("list --nets", "unrecognized arguments: --nets"),
    ("recipe nothing/at/all", "there is no recipe 'nothing/at/all'"),
    ("sync nowhere", "there is no folder nowhere"),
    ("sync params.yaml", "there is no folder params.yaml"),
    ("import", "the following arguments are required: file"),
    ("import nowhere.pth", "cannot read nowhere.pth: No such file or directory"),
    ("import params.yaml", "params.yaml is truncated, damaged or no checkpoint"),
    ("import model", "model is a folder, expected a file"),
    ("import a.pth --arch resnet9", "--arch: there is no 'resnet9'; did you mean"),
    ("import a.pth --arch resnet14 --data cifar10", "its tensors are not those of resnet14"),
    ("import a.pth --arch resnet8 --data cifar11", "got 'cifar11'"),
    ("import a.pth --arch resnet8 --mix two", "argument --mix: invalid float value: 'two'"),
    ("import a.pth --arch resnet8 --data cifar10 --mix 0.5", "--mix is for HeadSharingKD's students"),
    ("import a.pth --arch resnet8 --image-size 0", "--image-size: expected 8 or more pixels, got 0"),
    ("import a.pth --arch resnet8 --data cifar10 --classes params.yaml", "--classes params.yaml: expected a JSON file"),
    ("import a.pth --arch resnet8 --data cifar10 --classes deep.json", "--classes deep.json: expected a JSON file (nested too"),
    ("import a.pth --arch resnet8 --data cifar10 --teacher model", "has no projector `proj`: leave it out"),
    ("import a.pth --part proj", "--part: a.pth holds no 'proj'"),
    ("import a.pth --arch resnet8 --data cifar10 --out model", "model is not empty"),
    ("export nowhere new", "no trained network in"),
    ("export params.yaml new", "params.yaml"),
    ("export . new", "no trained network in"),
    ("export model model", "model is not empty"),
    ("export model", "the following arguments are required: out"),
    ("train --config deep.json", "--config deep.json is not JSON: nested too deeply"),
]


@pytest.mark.parametrize(("line", "said"), NONSENSE, ids=[line for line, _ in NONSENSE])
def test_nonsense_on_the_command_line(line: str, said: str, checkout: Path, refused: Callable[..., str]) -> None:
    (checkout / "deep.json").write_text("[" * 100_000)
    shutil.copytree(ROOT / "recipes", checkout / "recipes", dirs_exist_ok=True)
    assert said in refused(line)
