"""data.name=shards: what is wrong with shards is told in one line, what is hostile is not followed, and nothing is lost."""

import gzip
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from pupil.data import Data, limits
from pupil.data import shards as source
from tests.test_shards import data, error, trees
from tests.test_sources import GREY
from tests.test_tar import LONG, Content, pack

JPG = GREY[7]


def told(tmp_path: Path, *contents: Content) -> str:
    """What is said of a shard that begins with good samples."""
    pack(tmp_path / "x.tar", *trees(6), *contents)
    text = error(data(tmp_path / "x.tar"), tmp_path / "out")
    assert text.startswith(f"data.path is '{tmp_path / 'x.tar'}': ")
    return text.partition("': ")[2]


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ([("a.jpg", JPG)], "x.tar: a.jpg has no label: a.cls, or label or cls or class in a.json, must be next to it"),
        ([("a.jpg", JPG), ("b.jpg", JPG), ("a.cls", b"1"), ("b.cls", b"1")], "x.tar: a.jpg has no label"),
        ([("a.jpg", JPG), ("a.json", b'{"width": 3}')], "a.jpg has no label"),
        ([("a.jpg", JPG), ("a.json", b'{"label": null}')], "a.jpg has no label"),
        ([("a.jpg", JPG), ("a.json", b"[1]")], "a.jpg has no label"),
        ([("a.cls", b"1")], "x.tar: a.cls is the label of no image; pack the shard again"),
        ([("a.json", b'{"label": 1}')], "label of a.json is the label of no image"),
        (
            [("a.jpg", JPG), ("a.cls", b"1"), ("a.json", b'{"cls": 0}')],
            "two labels of one image: 1 in a.cls, 0 in cls of a",
        ),
        (
            [("a.jpg", JPG), ("a.json", b'{"class": "eel", "label": "cat"}')],
            "'cat' in label of a.json, 'eel' in class of a",
        ),
        ([("a.jpg", JPG), ("a.cls", b"1"), ("a.cls", b"0")], "two labels of one image: 1 in a.cls, 0 in a.cls"),
        ([("a.jpg", JPG), ("a.png", JPG), ("a.cls", b"1")], "a.jpg and a.png are two images of one sample; keep one of them"),
        ([("a.1.jpg", JPG), ("a.1.cls", b"1")], "a.1.jpg is no image of a sample: dots must not be in its name but before"),
        ([("a.jpg", JPG), ("a.cls", b"")], "a.cls is ''; a whole number or the name of a class is needed, on one line"),
        ([("a.jpg", JPG), ("a.cls", b"1\n2")], "a.cls is '1\\n2'; a whole number or the name"),
        ([("a.jpg", JPG), ("a.cls", b"c" * 201)], "a.cls is 'ccc"),
        ([("a.jpg", JPG), ("a.cls", b"\xff\xfe")], "a.cls is no cls file that can be read ('utf-8' codec"),
        ([("a.jpg", JPG), ("a.json", b"{")], "a.json is no json file that can be read (Expecting"),
        ([("a.jpg", JPG), ("a.json", b"[" * 100_000)], "a.json is no json file that can be read (nested too deeply)"),
        ([("a.jpg", JPG), ("a.json", b'{"label": ' + b"1" * 5000 + b"}")], "a.json is no json file that can be read"),
        ([("a.jpg", JPG), ("a.json", b'{"label": 1.5}')], "label of a.json is '1.5'; a whole number or a text is needed"),
        ([("a.jpg", JPG), ("a.json", b'{"label": true}')], "label of a.json is 'True'"),
        ([("a.jpg", JPG), ("a.json", b'{"cls": [1, 2]}')], "cls of a.json is '[1, 2]'"),
        ([("a.jpg", JPG), ("a.cls", bytes((1 << 20) + 1))], "a.cls has 1048577 bytes, more than 1048576, and is no label"),
        ([("a.jpg", JPG), ("a.cls", b"-1")], "the label of x.tar/a.jpg is -1; classes are numbered from 0"),
        ([("a.jpg", JPG), ("a.cls", b"3")], "the label of x.tar/a.jpg is 3, but none is 2: 3 classes are numbered 0 to 2"),
        ([("a.jpg", JPG), ("a.cls", b"9" * 18)], "but none is 2"),
        ([("a.jpg", JPG), ("a.cls", b"eel")], "the label of x.tar/0.jpg is the number 0, of x.tar/a.jpg the name 'eel'"),
        ([("../a.jpg", JPG), ("../a.cls", b"1")], "the name '../a.jpg' leads out of it; nothing was read"),
        ([("/etc/a.jpg", JPG)], "the name '/etc/a.jpg' leads out of it"),
        ([("a/../../b.cls", b"1")], "leads out of it"),
    ],
)
def test_samples_that_are_not_whole(contents: list[tuple[str, bytes]], said: str, tmp_path: Path) -> None:
    assert said in told(tmp_path, *[(name, raw, {}) for name, raw in contents])


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_not_followed(kind: bytes, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(JPG)
    odd = {"type": kind, "linkname": str(tmp_path / "secret.jpg")}
    said = "is a link or a device; pack it again with tar --dereference --hard-dereference"
    assert said in told(tmp_path, ("a.jpg", b"", odd), ("a.cls", b"1", {}))
    assert said in told(tmp_path, ("a.jpg", JPG, {}), ("a.cls", b"", odd))


def test_sizes_and_numbers_of_files_have_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same: list[Content] = [(f"a.{i}", b"", {}) for i in range(1001)]
    assert "more than 1000 files have the key 'a', the name up to its first dot" in told(tmp_path, *same)
    monkeypatch.setattr(limits, "MOST_FILES", 5)
    assert "more than 5 files" in told(tmp_path)


@pytest.mark.parametrize("cut", [0, 100, 700, 3 * 512, -1024, -10240])
def test_a_shard_cut_short_is_named(cut: int, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        path = pack(tmp_path / f"in/{i}.tar", *trees(6), form="gnu")
    raw = path.read_bytes()
    used = raw[: len(raw.rstrip(b"\0")) + 511 & ~511]
    path.write_bytes(used if cut == -10240 else raw[:cut] if cut >= 0 else used[:cut])
    assert "': 2.tar: it is cut short; fetch it again" in error(data(tmp_path / "in"), tmp_path / "out")


def test_long_names_are_told_and_kept(tmp_path: Path) -> None:
    assert f"x.tar: {LONG} has no label" in told(tmp_path, (LONG, JPG, {}))
    for label in (b"eel", b"9"):
        assert "x.tar/line\\nbreak.jpg" in told(tmp_path, ("line\nbreak.jpg", JPG, {}), ("line\nbreak.cls", label, {}))


def one(tmp_path: Path, *names: str) -> Data:
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        pack(tmp_path / "in" / name, *trees(8))
    return data(tmp_path / "in")


def test_paths_without_shards(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(JPG)
    for config, said in (
        (replace(data(tmp_path), path=None), "data.path is not given: data.name=shards reads the .tar files of a folder"),
        (data(tmp_path / "nowhere"), "there is no such folder or .tar file; correct the path"),
        (data(tmp_path / "in"), "no .tar file is there; data.name=shards reads WebDataset shards, data.name=folder images"),
        (data(tmp_path / "in/a.jpg"), "no .tar file is there"),
    ):
        assert said in error(config, tmp_path / "out")
    config = replace(one(tmp_path, "a.tar"), test_path=str(tmp_path / "nowhere"))
    assert "nowhere': there is no such folder or .tar file" in error(config, tmp_path / "out")


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "train/b.TAR.XZ", "c.tar.zst"])
def test_compressed_shards_are_to_be_unpacked(name: str, tmp_path: Path) -> None:
    config = one(tmp_path, "train/a.tar", name)
    (tmp_path / "in" / name).write_bytes(gzip.compress((tmp_path / "in" / name).read_bytes()))
    assert f"{name} is compressed, so that no image can be read in place; unpack it" in error(config, tmp_path / "out")
    (tmp_path / "in/train/a.tar").write_bytes(gzip.compress(b"images"))
    (tmp_path / "in" / name).unlink()
    assert "train/a.tar: it is " in error(config, tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["train-0.tar", "extra.tar"], "extra.tar says no split in its name or folder, train-0.tar does; rename or remove it"),
        (["val-0.tar", "test-0.tar"], "shards of test and val, none of train; add them, or give one split"),
        (["train/val-0.tar"], "the name train/val-0.tar says train and val; rename it to say one of them"),
    ],
)
def test_splits_that_cannot_be_told_apart(names: list[str], said: str, tmp_path: Path) -> None:
    assert said in error(one(tmp_path, *names), tmp_path / "out")


def test_splits_have_the_classes_of_training(tmp_path: Path) -> None:
    config = one(tmp_path, "train-0.tar")
    pack(tmp_path / "in/val-0.tar", *trees(4, classes=3))
    text = error(config, tmp_path / "out")
    assert "the label of val-0.tar/2.jpg is 2, which no training image has; the test images must be of the classes" in text
    pack(tmp_path / "in/val-0.tar", *trees(4, classes=1))
    assert "class '1' has 0 images for test: 1 or more are needed" in error(config, tmp_path / "out")
    pack(tmp_path / "in/val-0.tar")
    assert "no image is in val-0.tar; give shards that hold some" in error(config, tmp_path / "out")
    pack(tmp_path / "in/train-0.tar", *trees(4, classes=1))
    pack(tmp_path / "in/val-0.tar", *trees(4, classes=1))
    assert "one class (0); images of 2 classes or more are needed" in error(config, tmp_path / "out")
    pack(tmp_path / "in/train-0.tar", *trees(4, first=1))
    assert "train-0.tar/1.jpg is 2, but none is 0: 2 classes are numbered 0 to 1; number" in error(config, tmp_path / "out")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"ash\n", "the label of a.tar/1.jpg is 1, which is none of the 1 classes of classes.txt; name every class there"),
        (b"ash\n\nbirch\n", "classes.txt must have the name of a class in each line"),
        (b"", "classes.txt must have the name"),
        (b"ash\nbi\x00rch\n", "classes.txt must have the name"),
        (b"ash\n\xff\n", "cannot read classes.txt ("),
    ],
)
def test_lists_of_classes_that_do_not_fit(raw: bytes, said: str, tmp_path: Path) -> None:
    config = one(tmp_path, "a.tar")
    (tmp_path / "in/classes.txt").write_bytes(raw)
    assert said in error(config, tmp_path / "out")


def test_lists_of_classes_that_contradict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = one(tmp_path, "a.tar")
    for name, text in (("classes.txt", "ash\nbirch"), ("classnames.txt", "birch\nash")):
        (tmp_path / "in" / name).write_text(text)
    assert "classes.txt and classnames.txt name other classes; keep one of them" in error(config, tmp_path / "out")
    (tmp_path / "in/classnames.txt").unlink()
    monkeypatch.setattr(source, "MOST_LIST", 5)
    assert "classes.txt must have the name" in error(config, tmp_path / "out")
    monkeypatch.undo()
    pack(tmp_path / "in/a.tar", ("0.jpg", JPG, {}), ("0.cls", b"ash", {}), ("1.jpg", JPG, {}), ("1.cls", b"elm", {}))
    assert "is 'elm', which is none of the 2 classes of classes.txt" in error(config, tmp_path / "out")
    (tmp_path / "in/classes.txt").write_text("ash\nelm\nash")
    assert "classes.txt names a class twice; name each once" in error(config, tmp_path / "out")


def test_links_to_shards_elsewhere_are_refused(tmp_path: Path) -> None:
    config = one(tmp_path, "a.tar")
    pack(tmp_path / "b.tar", *trees(4))
    (tmp_path / "in/b.tar").symlink_to(tmp_path / "b.tar")
    assert "b.tar is a link to" in error(config, tmp_path / "out")
    (tmp_path / "in/b.tar").unlink()
    os.mkfifo(tmp_path / "in/b.tar")
    assert "b.tar is no file but a pipe or a device" in error(config, tmp_path / "out")
