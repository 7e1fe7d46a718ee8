"""The published image sets, small ones in their authors' layouts; what is said when they are not there."""

import gzip
import hashlib
import io
import struct
import tarfile
import urllib.error
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from pupil.data import SOURCES, Data, load, prepare
from pupil.data.tree import list_tree
from pupil.types import UserError

Files = dict[str, bytes]


def jpeg(value: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(buffer, "jpeg")
    return buffer.getvalue()


GREY = [jpeg(value) for value in range(256)]


def tiny_imagenet() -> Files:
    """Class k is of grey k; the folders are listed in another order than that of the ids."""
    wnids = [f"n{k:08}" for k in range(200)]
    files = {f"train/{w}/images/{w}_{i}.JPEG": GREY[k] for k, w in reversed(list(enumerate(wnids))) for i in range(2)}
    files |= {f"train/{w}/{w}_boxes.txt": b"box" for w in wnids}
    files |= {f"val/images/val_{k}.JPEG": GREY[199 - k] for k in range(200)}
    lines = "".join(f"val_{k}.JPEG\t{wnids[199 - k]}\t0\t0\t63\t63\n" for k in range(200))
    return files | {"val/val_annotations.txt": lines.encode(), "wnids.txt": b"n1\n", "test/images/test_0.JPEG": GREY[0]}


def cub200() -> Files:
    rows = [(k, i, f"{k + 1:03}.Bird_{k}/Bird_{k}_{i}.jpg") for k in range(200) for i in range(3)]
    ids = range(1, len(rows) + 1)
    return {
        **{f"images/{file}": GREY[k] for k, _, file in rows},
        "images.txt": "".join(f"{n} {file}\n" for n, (_, _, file) in zip(ids, rows, strict=True)).encode(),
        "image_class_labels.txt": "".join(f"{n} {k + 1}\n" for n, (k, _, _) in zip(ids, rows, strict=True)).encode(),
        "train_test_split.txt": "".join(f"{n} {int(i < 2)}\n" for n, (_, i, _) in zip(ids, rows, strict=True)).encode(),
        "README": b"birds",
    }


def mit67() -> Files:
    names = [f"room{k:02}" for k in range(67)]
    lists = {"TrainImages.txt": range(2), "TestImages.txt": range(2, 3)}
    texts = {text: "\n".join(f"{n}/{i}.jpg" for i in part for n in names).encode() for text, part in lists.items()}
    return texts | {f"Images/{n}/{i}.jpg": GREY[k] for k, n in enumerate(names) for i in range(4)}  # more than are listed


def imagenet() -> Files:
    train = {f"train/n{k:08}/{i}.JPEG": GREY[k % 256] for k in range(1000) for i in range(2)}
    return train | {f"val/n{k:08}/0.JPEG": GREY[k % 256] for k in range(1000)}


LAYOUTS: dict[str, Callable[[], Files]] = {
    "tiny_imagenet": tiny_imagenet,
    "tiny_imagenet_sakd": tiny_imagenet,
    "cub200": cub200,
    "cub200_refilled": cub200,
    "mit67": mit67,
    "imagenet": imagenet,
}


def as_folder(files: Files, path: Path) -> Path:
    for name, raw in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(raw)
    return path


def as_zip(files: Files, path: Path) -> Path:
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
        for name, raw in files.items():
            archive.writestr(f"a set/{name}", raw)
    return path.with_suffix(".zip")


def as_tgz(files: Files, path: Path) -> Path:
    with tarfile.open(path.with_suffix(".tgz"), "w:gz") as archive:
        for name, raw in files.items():
            info = tarfile.TarInfo(f"./CUB_200_2011/{name}")
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return path.with_suffix(".tgz")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_published_set_is_read_from_its_authors_layout(tmp_path: Path, name: str) -> None:
    pack = {"cub200": as_tgz, "imagenet": as_zip, "tiny_imagenet": as_zip, "mit67": as_folder}.get(name, as_folder)
    path = pack(LAYOUTS[name](), tmp_path / "in")
    source = SOURCES[name]
    manifest = prepare(Data(name=name, path=str(path), image_size=8, val_images=source.classes), tmp_path / "out")
    n = source.classes
    assert manifest["counts"] == {"train": n, "val": n, "test": n}
    assert (tuple(manifest["mean"]), tuple(manifest["std"])) == source.statistics
    assert manifest["classes"] == sorted(manifest["classes"])
    for images, labels in load(tmp_path / "out").splits.values():
        assert labels.bincount().tolist() == [1] * n
        assert [int(images[i][0, 4, 4]) for i in range(n)] == [label % 256 for label in labels.tolist()]


def test_an_archive_gives_the_same_images_as_its_folder(tmp_path: Path) -> None:
    files = cub200()
    digests = set()
    for pack in (as_folder, as_zip, as_tgz):
        config = Data(name="cub200", path=str(pack(files, tmp_path / "in")), image_size=8, classes=5)
        digests.add(prepare(config, tmp_path / "out")["digest"])
    assert len(digests) == 1


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_set_that_is_not_there_is_told_with_what_to_get_and_in_which_layout(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    for path, part in ((None, "data.path is not given"), (tmp_path / "in", "data.path is")):
        with pytest.raises(UserError) as caught:
            prepare(Data(name=name, path=None if path is None else str(path)), tmp_path / "out")
        text = str(caught.value)
        assert part in text
        assert "https://" in text or "http://" in text
        assert "/*.jpg" in text or "/*.JPEG" in text
        assert "\n" not in text


@pytest.mark.parametrize("name", ["tiny_imagenet", "cub200", "mit67"])
def test_a_part_of_a_published_set_is_refused(tmp_path: Path, name: str) -> None:
    files = {k: v for k, v in LAYOUTS[name]().items() if "n00000007" not in k}
    for text in ("images.txt", "image_class_labels.txt", "train_test_split.txt"):
        files |= {text: b"\n".join(files[text].split(b"\n")[3:])} if name == "cub200" else {}
    for text in ("TrainImages.txt", "TestImages.txt"):
        files |= {text: b"\n".join(x for x in files[text].split(b"\n") if b"room07" not in x)} if name == "mit67" else {}
    with pytest.raises(UserError, match="fetch"):
        prepare(Data(name=name, path=str(as_zip(files, tmp_path / "in")), image_size=8), tmp_path / "out")


def test_lists_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    for text, raw, part in (
        ("images.txt", b"1 a/b.jpg\n", "name different images"),
        ("images.txt", b"1\n", "the line '1' of a list of cub200 is cut"),
        ("image_class_labels.txt", b"".join(b"%d x\n" % (n + 1) for n in range(600)), "must number the classes"),
    ):
        path = as_zip(cub200() | {text: raw}, tmp_path / "in")
        with pytest.raises(UserError, match=part):
            prepare(Data(name="cub200", path=str(path)), tmp_path / "out")


def test_a_listed_image_that_is_missing_is_unreadable(tmp_path: Path) -> None:
    files = mit67()
    del files["Images/room03/2.jpg"], files["Images/room04/0.jpg"]
    for pack in (as_folder, as_zip, as_tgz):
        config = Data(name="mit67", path=str(pack(files, tmp_path / pack.__name__)), image_size=8)
        with pytest.raises(UserError, match=r"cannot read 2 images: .*room04/0.jpg \(.*, .*room03/2.jpg \("):
            prepare(config, tmp_path / "out")


def test_a_damaged_tar_gz_is_told_in_one_line(tmp_path: Path) -> None:
    whole = as_tgz(mit67(), tmp_path / "in").read_bytes()
    for raw in (whole[: len(whole) // 2], b"no archive", b"", gzip.compress(b"no archive")):
        (tmp_path / "x.tgz").write_bytes(raw)
        with pytest.raises(UserError, match=r"x\.tgz': this \.tar\.gz file cannot be read"):
            list_tree("data.path", str(tmp_path / "x.tgz"))


# Fashion-MNIST


def fake_fashion(raw: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A small one in the real layout, still packed, and its checksums in torchvision's class; the training images."""
    raw.mkdir(parents=True)
    sums, images = [], {}
    for part, n in (("train", 60), ("t10k", 20)):
        images[part] = np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = np.arange(n, dtype=np.uint8) % 10
        content = {
            f"{part}-images-idx3-ubyte.gz": struct.pack(">4i", 2051, n, 28, 28) + images[part].tobytes(),
            f"{part}-labels-idx1-ubyte.gz": struct.pack(">2i", 2049, n) + labels.tobytes(),
        }
        for name, plain in content.items():
            packed = gzip.compress(plain)
            (raw / name).write_bytes(packed)
            sums.append((name, hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(datasets.FashionMNIST, "resources", sums)
    return images["train"]


def no_network(*args: object, **kwargs: object) -> None:
    raise urllib.error.URLError("Network is unreachable")


def test_fashion_mnist_becomes_three_equal_channels_of_the_size_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    pixels = fake_fashion(tmp_path / "home" / "FashionMNIST" / "raw", monkeypatch)
    config = Data(name="fashion_mnist", path=str(tmp_path / "home"), image_size=28, val_images=10)
    manifest = prepare(config, tmp_path / "out")
    assert manifest["counts"] == {"train": 50, "val": 10, "test": 20}
    assert (manifest["mean"], manifest["std"]) == ([0.286] * 3, [0.353] * 3)
    assert manifest["classes"][0] == "T-shirt/top"
    images, labels = load(tmp_path / "out").splits["val"]
    assert torch.equal(images[:, 0], images[:, 2])
    assert all((pixels == image[0].numpy()).all((1, 2)).any() for image in images)
    assert labels.tolist() != [0] * 10
    prepare(Data(name="fashion_mnist", path=str(tmp_path / "home"), image_size=32), tmp_path / "out")
    assert load(tmp_path / "out").splits["test"][0].shape == (20, 3, 32, 32)


def test_without_a_network_fashion_mnist_says_which_files_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    raw = tmp_path / "home" / "FashionMNIST" / "raw"
    fake_fashion(raw, monkeypatch)
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(b"damaged")
    with pytest.raises(UserError) as caught:
        prepare(Data(name="fashion_mnist", path=str(tmp_path / "home")), tmp_path / "out")
    text = str(caught.value)
    assert "Network is unreachable" in text
    assert "t10k-images-idx3-ubyte.gz" in text
    assert f"into {raw}" in text
    assert "\n" not in text
