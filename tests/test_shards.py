"""data.name=shards: the same images as of a folder, each mistake told in one line, nothing hostile believed."""

import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import pupil.__main__  # noqa: F401  its names must exist before they are redirected
from pupil import tracking
from pupil.data import Data, limits, load, prepare
from pupil.data.prepare import Prepared
from pupil.data.sources import SOURCES
from pupil.estimate import file_size
from pupil.types import UserError
from tests.inprocess import at_home, run
from tests.test_loaders import FROM_FILES, loader, picture
from tests.test_sources import GREY
from tests.test_tar import Content, pack

pytestmark = pytest.mark.filterwarnings("ignore:.*pupil.__main__.*:RuntimeWarning")  # runpy runs it again, on purpose
ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("ash", "birch", "cedar")
SPLITS = {"train": 12, "val": 3, "test": 4}  # images of each class


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("folder"), np.random.default_rng(0)
    for split, number in SPLITS.items():
        for k, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                w, h = (int(x) for x in rng.integers(25, 90, 2))
                picture(rng, w, h, k).save(root / split / name / f"{i:02}.jpg", quality=90)
    return root


def number(k: int, key: str) -> Iterator[Content]:
    yield f"{key}.cls", f"{k}\n".encode(), {}


def word(k: int, key: str) -> Iterator[Content]:
    yield f"{key}.cls", CLASSES[k].encode(), {}


def number_in_json(k: int, key: str) -> Iterator[Content]:
    yield f"{key}.json", json.dumps({"label": k, "class": CLASSES[k], "width": 3}).encode(), {}


def word_in_json(k: int, key: str) -> Iterator[Content]:
    yield f"{key}.json", json.dumps({"label": None, "class": CLASSES[k]}).encode(), {}


def both(k: int, key: str) -> Iterator[Content]:
    yield f"{key}.CLS", str(k).encode(), {}
    yield f"{key}.json", json.dumps({"cls": str(k), "label": CLASSES[k]}).encode(), {}
    yield f"{key}.mask.png", b"no image", {}
    yield f"{key}.txt", b"a tree", {}


LABELS = {f.__name__: f for f in (number, word, number_in_json, word_in_json, both)}


def make_shards(
    folder: Path, out: Path, label: Callable[[int, str], Iterator[Content]] = number, name: str = "{}-{:06}.tar", each: int = 10
) -> Path:
    """The folder's images in its own order, `each` to a shard."""
    for split in SPLITS:
        files = sorted((folder / split).rglob("*.jpg"))
        for i in range(0, len(files), each):
            contents: list[Content] = []
            for path in files[i : i + each]:
                key = f"./{path.parent.name}/{path.stem}"
                contents += [(f"{key}.JPG", path.read_bytes(), {}), *label(CLASSES.index(path.parent.name), key)]
            where = out / name.format(split, i // each)
            where.parent.mkdir(parents=True, exist_ok=True)
            pack(where, *contents, form="gnu")
    if label in (number, number_in_json, both):
        (out / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return out


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(folder, tmp_path_factory.mktemp("shards"))


def data(path: Path, **more: object) -> Data:
    return replace(Data(name="shards", path=str(path), image_size=8), **more)


def error(config: Data, out: Path) -> str:
    """The one line that the user reads; nothing is left on the disk."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        prepare(config, out)
    assert sorted(out.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the same as of a folder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["pad", "resized"])
@pytest.mark.parametrize("label", LABELS)
def test_prepared_data_are_those_of_a_folder_of_the_same_images(folder: Path, tmp_path: Path, label: str, crop: str) -> None:
    config = Data(name="folder", path=str(folder), image_size=16, crop=crop)
    theirs = prepare(config, tmp_path / "theirs")
    shards = make_shards(folder, tmp_path / "shards", LABELS[label])
    ours = prepare(replace(config, name="shards", path=str(shards)), tmp_path / "ours")
    for key in ("sha256", "classes", "counts", "class_counts", "mean", "std", "augment", "source_splits"):
        assert ours[key] == theirs[key], key
    for name in ("train", "val", "test"):
        a, b = (tmp_path / where / f"{name}.safetensors" for where in ("ours", "theirs"))
        assert a.read_bytes() == b.read_bytes()


def test_draws_folds_subsets_and_teachers_are_those_of_a_folder(folder: Path, made: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(folder / "train", alone)
    shards = tmp_path / "shards"
    shards.mkdir()
    for path in [*made.glob("train-*"), made / "classes.txt"]:
        shutil.copy(path, shards)
    for more in (
        {"per_class": 3, "seed": 4},
        {"folds": 3, "fold": 1},
        {"classes": ("cedar", "ash")},
        {"classes": (0, 1), "teacher_classes": "all"},
        {"train_images": 9, "val_images": 6, "test_images": 6},
    ):
        theirs = prepare(Data(name="folder", path=str(alone), image_size=8, **more), tmp_path / "theirs")
        ours = prepare(data(shards, **more), tmp_path / "ours")
        assert ours["sha256"] == theirs["sha256"], more
        assert ours["teacher_classes"] == theirs["teacher_classes"]


def test_the_fingerprint_sees_names_sizes_labels_and_the_list_of_classes(folder: Path, made: Path, tmp_path: Path) -> None:
    def fingerprint(path: Path) -> str | None:
        return SOURCES["shards"].load(data(path)).fingerprint

    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    assert fingerprint(copy) == fingerprint(made)
    (copy / "classes.txt").write_text("ash\nbeech\ncedar\n")
    assert fingerprint(copy) != fingerprint(made)
    other = make_shards(folder, tmp_path / "other", lambda k, key: number((k + 1) % 3, key))
    assert fingerprint(other) != fingerprint(made)


def test_unreadable_images_stop_or_are_dropped(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    raw = (copy / "train/birch/03.jpg").read_bytes()
    (copy / "train/birch/03.jpg").write_bytes(raw[:200])
    shards = make_shards(copy, tmp_path / "shards")
    assert "cannot read image train-000001.tar/birch/03.JPG (" in error(data(shards), tmp_path / "out")
    manifest = prepare(data(shards, unreadable="drop"), tmp_path / "out")
    assert manifest["counts"] == {"train": 35, "val": 9, "test": 12}
    assert "birch/03.JPG" in (tmp_path / "out/report.txt").read_text()


def test_an_image_that_is_too_large_is_named_and_not_read(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_BYTES", 400)
    assert "bytes, more than 400)" in error(data(made), tmp_path / "out")


def test_a_shard_that_shrinks_after_it_was_listed_is_told(made: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    content = SOURCES["shards"].load(data(copy))
    with open(copy / "train-000000.tar", "r+b") as file:
        file.truncate(512)
    images = content.train.read(torch.arange(12), lambda n: None)
    assert list(images.unreadable) == list(range(10))
    assert set(images.unreadable.values()) == {"its shard became shorter after it was listed"}


# --- loaders, estimates, commands -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crops(folder: Path, made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Prepared]:
    """Of the folder and of the shards."""
    out, config = tmp_path_factory.mktemp("crops"), Data(name="folder", path=str(folder), image_size=16, crop="resized")
    prepare(config, out / "folder")
    prepare(replace(config, name="shards", path=str(made)), out / "shards")
    return load(out / "folder"), load(out / "shards")


@pytest.mark.parametrize("kind", FROM_FILES)
def test_loaders_show_the_images_of_the_folder(kind: str, crops: tuple[Prepared, Prepared]) -> None:
    theirs, ours = (loader(kind, data) for data in crops)
    for epoch in (1, 2):
        for a, b in zip(ours.epoch(epoch), theirs.epoch(epoch), strict=True):
            assert torch.equal(a.ids, b.ids)
            assert torch.equal(a.labels, b.labels)
            assert torch.equal(a.images, b.images)


def test_the_estimate_sees_images_not_shards(folder: Path, made: Path) -> None:
    sizes = [path.stat().st_size for path in sorted((folder / "test").rglob("*.jpg"))[:10]]
    assert file_size(data(made)) == sum(sizes) // len(sizes)


def test_check_and_prepare_run_as_commands(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    at_home(tmp_path, monkeypatch)
    given = f"data.name=shards data.path={made} data.image_size=16 data.train_images=null data.val_images=null"
    small = (
        "data.test_images=null 'teachers=[resnet8]' 'methods=[kd]' 'seeds=[0]' optim.batch_size=9 teacher.optim.batch_size=9"
    )
    assert run(f"check {given} {small}", monkeypatch) == 0, capfd.readouterr().err
    assert "3 classes, {'train': 36, 'val': 9, 'test': 12} images of 16 pixels" in capfd.readouterr().out
    assert run(f"prepare {given} data.test_images=null out=data record=log", monkeypatch) == 0, capfd.readouterr().err
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    assert manifest["classes"] == list(CLASSES)
    assert manifest["counts"] == {"train": 36, "val": 9, "test": 12}
    assert (tmp_path / "data/contact_sheet.png").stat().st_size > 1000


# --- splits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("train/{}.tar", "val/{}.tar", "test/{}.tar"),
        ("a set/Train/{}.TAR", "a set/valid/{}.tar", "a set/test_set/{}.tar"),
        ("imagenet-train-{:06}.tar", "imagenet-val-{:06}.tar", "imagenet-test-{:06}.tar"),
        ("train_{}.tar", "validation{}.tar", "test.{}.tar"),
        ("imagenet1k-train-{:04}.tar", "imagenet1k-validation-{:02}.tar", None),
        ("x/{}.tar", None, None),
        ("train/{}.tar", None, None),
        ("contest-{}.tar", None, None),
    ],
)
def test_splits_are_folders_or_words_of_the_names(names: tuple[str | None, ...], tmp_path: Path) -> None:
    sizes = (10, 4, 6)
    for name, n in zip(names, sizes, strict=True):
        for i in range(2 * (name is not None)):
            path = tmp_path / "in" / str(name).format(i)
            path.parent.mkdir(parents=True, exist_ok=True)
            pack(path, *trees(n))
    content = SOURCES["shards"].load(data(tmp_path / "in"))
    found = {name: len(pool.labels) for name in ("train", "val", "test") if (pool := getattr(content, name)) is not None}
    given = [2 * n for name, n in zip(names, sizes, strict=True) if name]
    assert found == dict(
        zip({3: ("train", "val", "test"), 2: ("train", "test"), 1: ("train",)}[len(given)], given, strict=True)
    )


def trees(n: int, classes: int = 2, first: int = 0) -> list[Content]:
    """Images of classes first, ... in turn."""
    return [
        content
        for i in range(n)
        for content in ((f"{i}.jpg", GREY[9 * i], {}), (f"{i}.cls", str(first + i % classes).encode(), {}))
    ]


def test_test_path_is_another_folder_or_tar(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pack(tmp_path / "in/train-0.tar", *trees(20))
    for name in ("more/train/a.tar", "more/b.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pack(tmp_path / name, *trees(6))
    config = data(tmp_path / "in", test_path=str(tmp_path / "more/b.tar"))
    assert prepare(config, tmp_path / "out")["class_counts"] == {"train": [9, 9], "val": [1, 1], "test": [3, 3]}
    pack(tmp_path / "in/val-0.tar", *trees(4))
    manifest = prepare(replace(config, test_path=str(tmp_path / "more")), tmp_path / "out")
    assert manifest["class_counts"] == {"train": [10, 10], "val": [2, 2], "test": [6, 6]}
    pack(tmp_path / "in/test-0.tar", *trees(4))
    text = error(config, tmp_path / "out")
    assert f"{tmp_path / 'in'} has test images of its own (test-0.tar); leave one of them out" in text


def test_one_tar_and_a_list_of_classes_beside_it(tmp_path: Path) -> None:
    pack(tmp_path / "in.tar", *trees(12))
    assert SOURCES["shards"].load(data(tmp_path / "in.tar")).classes == ("0", "1")
    (tmp_path / "classnames.txt").write_text("crane\r\nmaillot\r\ncrane\r\n")
    assert SOURCES["shards"].load(data(tmp_path / "in.tar")).classes == ("crane (0)", "maillot", "crane (2)")
    assert "class 'crane (2)' has 0 images for" in error(data(tmp_path / "in.tar"), tmp_path / "out")
    assert prepare(data(tmp_path / "in.tar", classes=(1, 0)), tmp_path / "out")["classes"] == ["maillot", "crane (0)"]


def test_numbers_are_in_their_order_and_names_in_theirs(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", *trees(24, classes=12))
    assert SOURCES["shards"].load(data(tmp_path / "a.tar")).classes == tuple(str(k) for k in range(12))
    named: list[Content] = [("0.cls", b"eel", {}), ("0.jpg", GREY[1], {}), ("1.cls", b"cat", {}), ("1.jpg", GREY[2], {})]
    pack(tmp_path / "b.tar", *named)
    content = SOURCES["shards"].load(data(tmp_path / "b.tar"))
    assert content.classes == ("cat", "eel")
    assert content.train.labels.tolist() == [1, 0]
    (tmp_path / "classes.txt").write_text("eel\ndog\ncat")
    content = SOURCES["shards"].load(data(tmp_path / "b.tar"))
    assert content.classes == ("eel", "dog", "cat")
    assert content.train.labels.tolist() == [0, 2]


def test_what_is_no_part_of_a_sample_is_left_out(tmp_path: Path) -> None:
    more: list[Content] = [
        ("README", b"hello", {}),
        ("info.json", b'{"made": "today"}', {}),
        ("._0.jpg", b"\0\5", {}),
        ("__MACOSX/0.jpg", b"\0\5", {}),
        ("d", b"", {"type": tarfile.DIRTYPE}),
        ("LICENSE.txt", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
    ]
    pack(tmp_path / "a.tar", *more, *trees(6))
    assert len(SOURCES["shards"].load(data(tmp_path / "a.tar")).train.labels) == 6


def test_the_same_key_in_two_places_is_two_samples(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", *trees(3), *trees(2))
    content = SOURCES["shards"].load(data(tmp_path / "a.tar"))
    assert content.train.labels.tolist() == [0, 1, 0, 0, 1]
