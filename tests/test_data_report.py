"""The report of what was prepared, and images that cannot be read."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pupil.data import Data, load, prepare
from pupil.types import UserError


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cats 12 x 10, dogs 20 x 30; train and test; one cat thrice in train, once more in test, a dog among the cats."""
    root = tmp_path_factory.mktemp("data") / "pets"
    rng = np.random.default_rng(0)
    for split, n in (("train", 10), ("test", 4)):
        for name, size in (("cat", (10, 12, 3)), ("dog", (30, 20, 3))):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(root / split / name / f"{i}.png")
    for copy in ("train/cat/x.png", "train/cat/y.png", "test/cat/z.png"):
        shutil.copy(root / "train/cat/0.png", root / copy)
    Image.open(root / "train/dog/1.png").save(root / "train/cat/dog.bmp")  # other bytes, the same pixels
    return root


def settings(path: Path) -> Data:
    return Data(name="folder", path=str(path), image_size=8, val_images=2)


def report(out: Path) -> dict[str, object]:
    return json.loads((out / "report.json").read_text())


def test_the_report_counts_classes_sizes_and_duplicates(tmp_path: Path, pets: Path) -> None:
    manifest = prepare(settings(pets), tmp_path / "out")
    found = report(tmp_path / "out")
    assert found["counts"] == manifest["counts"] == {"train": 21, "val": 2, "test": 9}
    assert [row["name"] for row in found["classes"]] == ["cat", "dog"]
    assert [row["test"] for row in found["classes"]] == [5, 4]
    assert found["native_sizes"] == {"width": [12, 12, 20], "height": [10, 10, 30]}
    twins = found["duplicates"]
    assert sum(twins["within"].values()) + twins["across"]["train-val"] == 3
    assert twins["across"]["train-test"] == 1
    assert (twins["groups"], twins["of_different_classes"]) == (2, 1)
    assert "train: train/cat/0.png" in twins["first"][0] + twins["first"][1]
    text = (tmp_path / "out" / "report.txt").read_text()
    assert "1 of test are in train too" in text
    assert "test: test/cat/z.png" in text


def test_the_contact_sheet_shows_the_prepared_pixels(tmp_path: Path, pets: Path) -> None:
    prepare(settings(pets), tmp_path / "out")
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.width > sheet.height > 50
        assert not {"Software", "Creation Time"} & set(sheet.info)
        sheet_colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 20)}
    images = load(tmp_path / "out").splits["train"][0]
    first = {tuple(pixel.tolist()) for pixel in images[0].flatten(1).T}
    assert first <= sheet_colours


def test_class_names_of_any_letters_can_be_drawn(tmp_path: Path, pets: Path) -> None:
    root = shutil.copytree(pets, tmp_path / "in")
    for split in ("train", "test"):
        (root / split / "cat").rename(root / split / "$\\frac 猫")
    assert "$\\frac 猫" in prepare(settings(root), tmp_path / "out")["classes"]


def test_file_names_that_are_not_utf8_are_reported_all_the_same(tmp_path: Path, pets: Path) -> None:
    root = shutil.copytree(pets, tmp_path / "in")
    for i in range(2):
        shutil.copy(root / "train/dog/2.png", root / f"train/dog/caf\udce9{i}.png")
    prepare(settings(root), tmp_path / "out")
    assert "caf\\udce90.png" in (tmp_path / "out" / "report.txt").read_text()


def test_many_classes_give_a_sheet_of_some(tmp_path: Path) -> None:
    for k in range(50):
        (tmp_path / "in" / f"{k:02}").mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8), (k, i, 0)).save(tmp_path / "in" / f"{k:02}" / f"{i}.png")
    prepare(Data(name="folder", path=str(tmp_path / "in"), image_size=8), tmp_path / "out")
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.height < 1300


def test_without_matplotlib_the_report_has_no_picture(tmp_path: Path, pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    digest = prepare(settings(pets), tmp_path / "out")["digest"]
    assert not (tmp_path / "out" / "contact_sheet.png").exists()
    assert (tmp_path / "out" / "report.txt").exists()
    assert load(tmp_path / "out").manifest["digest"] == digest


def test_the_report_is_not_needed_to_load(tmp_path: Path, pets: Path) -> None:
    prepare(settings(pets), tmp_path / "out")
    for name in ("report.json", "report.txt", "contact_sheet.png"):
        (tmp_path / "out" / name).unlink()
    assert load(tmp_path / "out").manifest["counts"]["test"] == 9


# Images that cannot be read


@pytest.fixture
def damaged(tmp_path: Path, pets: Path) -> Path:
    """Seven of them: six are no images, one is cut short."""
    root = shutil.copytree(pets, tmp_path / "in")
    whole = (root / "train/dog/0.png").read_bytes()
    (root / "train/dog/0.png").write_bytes(whole[: len(whole) // 2])
    for i in range(6):
        (root / f"test/cat/bad{i}.jpg").write_text("not an image")
    return root


def test_unreadable_images_stop_with_the_first_five_names_and_their_number(tmp_path: Path, damaged: Path) -> None:
    with pytest.raises(UserError) as caught:
        prepare(settings(damaged), tmp_path / "out")
    text = str(caught.value)
    assert "cannot read 7 images: train/dog/0.png (" in text
    assert "test/cat/bad3.jpg (not an image) and 2 more; " in text
    assert not (tmp_path / "out").exists()


def test_unreadable_images_that_are_dropped_are_counted_and_listed(tmp_path: Path, damaged: Path) -> None:
    config = replace(settings(damaged), unreadable="drop")
    manifest = prepare(config, tmp_path / "out")
    assert manifest["counts"]["test"] == 9
    assert manifest["counts"]["train"] + manifest["counts"]["val"] == 22
    assert manifest["dropped"] == len(manifest["unreadable"]) == 7
    assert report(tmp_path / "out")["unreadable"] == manifest["unreadable"]
    text = (tmp_path / "out" / "report.txt").read_text()
    assert "unreadable and dropped: 7" in text
    assert all(f"test/cat/bad{i}.jpg (not an image)" in text for i in range(6))
    images, labels = load(tmp_path / "out").splits["test"]
    assert len(images) == len(labels) == 9
    assert images.flatten(1).amax(1).min() > 0  # no black picture in place of a damaged one
    assert report(tmp_path / "out")["native_sizes"]["width"][0] == 12


def test_a_class_of_which_nothing_can_be_read_is_an_error(tmp_path: Path, pets: Path) -> None:
    root = shutil.copytree(pets, tmp_path / "in")
    for file in (root / "test/dog").iterdir():
        file.write_text("not an image")
    with pytest.raises(UserError, match="no image of class 'dog' for test can be read"):
        prepare(replace(settings(root), unreadable="drop"), tmp_path / "out")
