"""docs/their_commands.md: every block headed *here* runs, for a few steps on small made images of the right size."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from pupil import tracking
from pupil.config import read_params
from pupil.data import SOURCES
from tests.inprocess import at_home, run

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/their_commands.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
CLASSES, SHOWN = 10, {"train": 4, "test": 1}  # images of each class, one of the first for validation
QUICK = ("epochs=1", "batch_size=10", "milestones=[]")
SMALL = {  # what makes a method small
    "crd": ["hp.crd.k=16"],
    "crdth": ["hp.crdth.k=16"],
    "refilled": ["hp.refilled.init_epochs=1"],
}


def blocks(section: str) -> list[list[str]]:
    """The commands of each block headed *here*."""
    found = re.findall(r"^\*here\*.*?\n```\n(.*?)```", SECTIONS[section], re.MULTILINE | re.DOTALL)
    return [text.strip().splitlines() for text in found]


def made_images(root: Path, size: int) -> Path:
    """Class folders of JPEGs."""
    g = torch.Generator().manual_seed(size)
    for split, number in SHOWN.items():
        for k in range(CLASSES):
            folder = root / f"made{size}" / split / f"class{k}"
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = torch.randint(0, 256, (8, 8, 3), generator=g, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).resize((size, size)).save(folder / f"{i}.jpg")
    return root / f"made{size}"


def shortened(line: str, images: Path, crop: str) -> str:
    """`python stages/NAME.py ...` or `python -m pupil ...` as `run` takes it, with small settings at the end."""
    words = [word for word in shlex.split(line) if not word.startswith(("data.path=", "processes="))]
    if words[:3] == ["python", "-m", "pupil"]:
        return shlex.join(words[3:])
    assert line.startswith("python stages/"), line
    stage = Path(words[1]).stem
    words += ["data.name=folder", f"data.path={images}", f"data.val_images={CLASSES}", f"data.crop={crop}"]
    if stage == "train":
        words += [f"{'optim' if 'train.role=student' in words else 'teacher.optim'}.{word}" for word in QUICK]
    if stage == "distill":
        [method] = [word.partition("=")[2] for word in words if word.startswith("distill.method=")]
        words += [f"optim.{word}" for word in QUICK] + SMALL.get(method, [])
    return shlex.join([stage, *words[2:]])


def test_every_system_is_on_the_page() -> None:
    assert list(SECTIONS) == ["SimKD", "HeadSharingKD", "CSKD", "Spot-adaptive KD", "REFILLED"]
    for section, text in SECTIONS.items():
        assert len(blocks(section)) == text.count("*here*") == text.count("*theirs*"), section


@pytest.mark.parametrize("section", SECTIONS)
def test_what_is_said_to_be_the_same_runs(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    at_home(tmp_path, monkeypatch)
    images: dict[int, Path] = {}
    for commands in blocks(section):
        for command in commands:
            page = read_params(tmp_path / "params.yaml")["data"]
            size, crop = page["image_size"], SOURCES[page["name"]].augment.crop
            if command.startswith("python stages/prepare.py"):
                shutil.rmtree(tmp_path / "runs", ignore_errors=True)
                images[size] = images.get(size) or made_images(tmp_path, size)
            line = shortened(command, images.get(size, tmp_path), crop)
            assert run(line, monkeypatch) == 0, (command, line, capfd.readouterr().err)
            if command.startswith("python stages/") and "prepare" not in command:
                assert "test top-1" in capfd.readouterr().out, command
