"""Data: sources, draws, what is written, and the batches made of it."""

import hashlib
import io
import pickle
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision import datasets

from pupil.data import SOURCES, Data, load, prepare
from pupil.data.augment import Augment, crop, moves
from pupil.data.classes import class_sets
from pupil.data.draw import quotas
from pupil.data.resident import Resident
from pupil.sealed import read_sealed, write_sealed
from pupil.types import UserError

SMALL = Data(train_images=100, val_images=40, test_images=60, image_size=8)


def picture(value: int, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Image.Image:
    """Noise around a grey, width x height."""
    noise = np.random.default_rng(value).integers(0, 20, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise + np.uint8(value)).convert(mode)


def make_folder(root: Path, classes: dict[str, int], suffix: str = ".png") -> Path:
    for k, (name, n) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for i in range(n):
            picture(20 * k + i % 20).save(root / name / f"{i:03}{suffix}")
    return root


def make_zip(root: Path, path: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*")):
            archive.write(file, prefix + file.relative_to(root).as_posix())
    return path


def ids_of(out: Path) -> dict[str, list[int]]:
    return {name: load_file(out / f"{name}.safetensors")["source_ids"].tolist() for name in ("train", "val", "test")}


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def error(config: Data, out: Path) -> str:
    """The one line that the user reads; nothing is left on the disk."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        prepare(config, out)
    assert sorted(out.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def flowers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data") / "flowers", {"rose": 20, "aster": 10, "tulip": 30})


@pytest.fixture
def from_folder(flowers: Path) -> Data:
    return Data(name="folder", path=str(flowers), image_size=8)


# What is written


def test_the_same_settings_give_the_same_bytes(tmp_path: Path, from_folder: Data) -> None:
    for config in (SMALL, from_folder):
        prepare(config, tmp_path / "a")
        prepare(config, tmp_path / "b")
        assert contents(tmp_path / "a") == contents(tmp_path / "b")
        assert sorted(contents(tmp_path / "a")) == [
            *("contact_sheet.png", "manifest.json", "report.json", "report.txt"),
            *("test.safetensors", "train.safetensors", "val.safetensors"),
        ]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_load_gives_what_prepare_returned_and_wrote(tmp_path: Path) -> None:
    manifest = prepare(SMALL, tmp_path / "out")
    prepared = load(tmp_path / "out")
    assert prepared.manifest == manifest == read_sealed(tmp_path / "out" / "manifest.json")
    for name, (images, labels) in prepared.splits.items():
        assert images.shape == (manifest["counts"][name], 3, 8, 8)
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert labels.bincount(minlength=10).tolist() == manifest["class_counts"][name]
        ids = load_file(tmp_path / "out" / f"{name}.safetensors")["source_ids"]
        data = b"".join(t.numpy().tobytes() for t in (images, labels, ids))
        assert manifest["sha256"][name] == hashlib.sha256(data).hexdigest()
    assert manifest["config"]["train_images"] == 100
    assert manifest["augment"] == {"pad": 4, "flip": False, "crop": "pad"}


def test_prepared_files_can_be_read_by_whom_the_folder_can(tmp_path: Path) -> None:
    prepare(SMALL, tmp_path / "out")
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


def test_the_digest_follows_the_content_and_not_the_place(tmp_path: Path, flowers: Path, from_folder: Data) -> None:
    moved = shutil.copytree(flowers, tmp_path / "elsewhere")
    a, b = prepare(from_folder, tmp_path / "a"), prepare(replace(from_folder, path=str(moved)), tmp_path / "b")
    assert a["digest"] == b["digest"]
    assert a["digest"] != prepare(replace(from_folder, flip=False), tmp_path / "b")["digest"]
    assert a["digest"] != prepare(replace(from_folder, seed=1), tmp_path / "b")["digest"]


def test_mean_and_std_are_those_of_the_training_images(tmp_path: Path, from_folder: Data) -> None:
    manifest = prepare(from_folder, tmp_path / "out")
    images = load(tmp_path / "out").splits["train"][0].double() / 255
    assert manifest["mean"] == pytest.approx(images.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert manifest["std"] == pytest.approx(images.std((0, 2, 3), correction=0).tolist(), abs=1e-12)


def test_constant_images_have_a_usable_std(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (8, 8), (255, 128, 0)).save(tmp_path / "in" / name / f"{i}.png")
    manifest = prepare(Data(name="folder", path=str(tmp_path / "in"), image_size=8), tmp_path / "out")
    assert manifest["mean"] == [1.0, 128 / 255, 0.0]
    assert manifest["std"] == [1e-3] * 3


def test_progress_counts_every_image_to_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    prepare(SMALL, tmp_path / "out", lambda done, total: seen.append((done, total)))
    assert seen[-1] == (200, 200)
    assert seen == sorted(seen)


def test_an_error_leaves_what_was_prepared_before(tmp_path: Path) -> None:
    prepare(SMALL, tmp_path / "out")
    before = contents(tmp_path / "out")
    error(replace(SMALL, image_size=4), tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_folder_with_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert "something else than prepared data" in error(SMALL, tmp_path / "out")


def test_loading_what_is_not_there_or_of_another_format_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        load(tmp_path)
    prepare(SMALL, tmp_path / "out")
    manifest = read_sealed(tmp_path / "out" / "manifest.json")
    write_sealed(tmp_path / "out" / "manifest.json", {**manifest, "version": 99})
    with pytest.raises(UserError, match="format 99"):
        load(tmp_path / "out")
    (tmp_path / "out" / "val.safetensors").unlink()
    with pytest.raises(UserError, match="holds no prepared data"):
        load(tmp_path / "out")


@pytest.mark.slow
def test_pupil_data_imports_without_what_a_bare_gpu_box_lacks() -> None:
    banned = ("sklearn", "torchvision", "mlflow", "hydra", "omegaconf", "dvc")
    code = f"import sys\nimport pupil.data\nprint([m for m in {banned} if m in sys.modules])"
    source = str(Path(__file__).parents[1] / "src")
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": source}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Draws


def test_splits_are_disjoint_and_stratified(tmp_path: Path, from_folder: Data) -> None:
    manifest = prepare(from_folder, tmp_path / "out")
    ids = ids_of(tmp_path / "out")
    assert sorted(i for split in ids.values() for i in split) == list(range(60))
    assert manifest["classes"] == ["aster", "rose", "tulip"]
    assert manifest["class_counts"] == {"train": [7, 14, 22], "val": [1, 2, 2], "test": [2, 4, 6]}
    assert manifest["source_splits"] == {"train": "train", "val": "train", "test": "train"}


def test_digits_that_are_neither_train_nor_val_are_test(tmp_path: Path) -> None:
    counts = prepare(Data(train_images=1000, val_images=200, image_size=8), tmp_path / "out")["counts"]
    assert counts == {"train": 1000, "val": 200, "test": 597}
    counts = prepare(Data(image_size=8), tmp_path / "out")["counts"]
    assert counts == {"train": 1294, "val": 144, "test": 359}


def test_a_smaller_training_set_is_a_part_of_a_larger_one_with_the_same_val_and_test(tmp_path: Path) -> None:
    prepare(SMALL, tmp_path / "a")
    prepare(replace(SMALL, train_images=50), tmp_path / "b")
    a, b = ids_of(tmp_path / "a"), ids_of(tmp_path / "b")
    assert (a["val"], a["test"]) == (b["val"], b["test"])
    assert set(b["train"]) < set(a["train"])


def test_another_seed_draws_other_images(tmp_path: Path) -> None:
    prepare(SMALL, tmp_path / "a")
    prepare(replace(SMALL, seed=1), tmp_path / "b")
    a, b = ids_of(tmp_path / "a"), ids_of(tmp_path / "b")
    assert all(a[name] != b[name] for name in a)


def test_a_class_subset_is_relabelled_in_the_given_order(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    config = Data(image_size=8, classes=(7, "2"), train_images=40)
    manifest = prepare(config, tmp_path / "out")
    assert manifest["classes"] == ["7", "2"]
    target = load_digits().target
    for name, ids in ids_of(tmp_path / "out").items():
        labels = load(tmp_path / "out").splits[name][1]
        assert [(7, 2)[label] for label in labels.tolist()] == target[ids].tolist()


def test_per_class_gives_every_class_as_many_training_images(tmp_path: Path, from_folder: Data) -> None:
    few = prepare(replace(from_folder, per_class=3), tmp_path / "a")
    more = prepare(replace(from_folder, per_class=7), tmp_path / "b")
    assert (few["class_counts"]["train"], more["class_counts"]["train"]) == ([3] * 3, [7] * 3)
    assert few["class_counts"]["test"] == more["class_counts"]["test"] == [2, 4, 6]
    assert set(ids_of(tmp_path / "a")["train"]) < set(ids_of(tmp_path / "b")["train"])
    assert "class 'aster' has 10 images" in error(replace(from_folder, per_class=9), tmp_path / "c")
    digits = prepare(Data(image_size=8, per_class=5, val_images=10), tmp_path / "d")
    assert digits["counts"] == {"train": 50, "val": 10, "test": 1737}


def test_each_training_image_is_validated_in_one_fold_and_test_is_the_same_in_all(tmp_path: Path, from_folder: Data) -> None:
    folds = []
    for fold in range(4):
        manifest = prepare(replace(from_folder, folds=4, fold=fold), tmp_path / "out")
        assert manifest["counts"] == {"train": 36, "val": 12, "test": 12}
        assert all(abs(n - share) <= 1 for n, share in zip(manifest["class_counts"]["val"], (2, 4, 6), strict=True))
        folds.append(ids_of(tmp_path / "out"))
    assert all(ids["test"] == folds[0]["test"] for ids in folds)
    assert sorted(i for ids in folds for i in ids["val"]) == sorted(folds[0]["train"] + folds[0]["val"])
    assert all(sorted(ids["train"] + ids["val"]) == sorted(folds[0]["train"] + folds[0]["val"]) for ids in folds)


def test_a_fold_s_training_set_can_be_smaller(tmp_path: Path) -> None:
    config = Data(image_size=8, folds=3, fold=2, train_images=50, test_images=600)
    assert prepare(config, tmp_path / "out")["counts"] == {"train": 50, "val": 399, "test": 600}


def test_a_number_of_classes_is_the_start_of_cskd_s_permutation(tmp_path: Path) -> None:
    """The authors' tables, methods.md 6.5."""
    wanted = {10: [4, 6, 2, 7, 3, 5, 9, 0, 8, 1], 67: [19, 66, 23, 8, 46], 100: [82, 36, 20, 5, 93], 200: [105, 6, 168, 90, 65]}
    for of, first in wanted.items():
        assert class_sets(Data(classes=len(first)), tuple(map(str, range(of)))).student == first
    assert prepare(Data(image_size=8, classes=5), tmp_path / "out")["classes"] == ["4", "6", "2", "7", "3"]


def test_quotas_are_proportional_within_one_and_give_every_class_its_due() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        counts = torch.randint(3, 200, (7,), generator=generator).tolist()
        reserve = int(torch.randint(0, 3, (1,), generator=generator))
        n = int(torch.randint(7, sum(counts) - 7 * reserve + 1, (1,), generator=generator))
        found = quotas(counts, n, reserve)
        assert sum(found) == n
        assert all(1 <= q <= c - reserve for q, c in zip(found, counts, strict=True))
        if n < sum(counts) // 2:
            exact = [n * c / sum(counts) for c in counts]
            assert all(q == 1 or abs(q - e) < 2 for q, e in zip(found, exact, strict=True))


# Folders and zip files


def test_a_zip_gives_the_same_data_as_its_folder(tmp_path: Path, flowers: Path, from_folder: Data) -> None:
    made = {prepare(from_folder, tmp_path / "out")["digest"]}
    for prefix in ("", "flowers/", "a/b/"):
        path = make_zip(flowers, tmp_path / "flowers.zip", prefix)
        made.add(prepare(replace(from_folder, path=str(path)), tmp_path / "out")["digest"])
    assert len(made) == 1


def test_hidden_files_and_files_that_are_no_images_are_left_out(tmp_path: Path, flowers: Path, from_folder: Data) -> None:
    copy = shutil.copytree(flowers, tmp_path / "copy")
    (copy / "rose" / "notes.txt").write_text("red")
    (copy / "rose" / "._000.png").write_text("a resource fork")
    (copy / ".git").mkdir()
    (copy / "labels.csv").write_text("a,b")
    with zipfile.ZipFile(make_zip(copy, tmp_path / "copy.zip", "flowers/"), "a") as archive:
        archive.writestr("__MACOSX/flowers/rose/._000.png", "")
    wanted = prepare(from_folder, tmp_path / "out")["digest"]
    for path in (copy, tmp_path / "copy.zip"):
        assert prepare(replace(from_folder, path=str(path)), tmp_path / "out")["digest"] == wanted


def test_images_count_at_any_depth_below_their_class(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "in", {"cat": 4, "dog": 4})
    shutil.move(
        root / "cat" / "000.png", (root / "cat" / "x" / "y" / "000.png").parent.mkdir(parents=True) or root / "cat" / "x" / "y"
    )
    assert sum(prepare(Data(name="folder", path=str(root), image_size=8), tmp_path / "out")["counts"].values()) == 8


@pytest.mark.parametrize("names", [("train", "test"), ("train", "val"), ("Train", "Valid")])
def test_train_and_test_folders_are_the_splits(tmp_path: Path, names: tuple[str, str]) -> None:
    for name, n in zip(names, (20, 6), strict=True):
        make_folder(tmp_path / "in" / name, {"cat": n, "dog": n})
    path = make_zip(tmp_path / "in", tmp_path / "in.zip", "wrapped/")
    for place in (tmp_path / "in", path):
        manifest = prepare(Data(name="folder", path=str(place), image_size=8), tmp_path / "out")
        assert manifest["class_counts"] == {"train": [18, 18], "val": [2, 2], "test": [6, 6]}
        assert manifest["source_splits"] == {"train": "train", "val": "train", "test": "test"}


def test_a_val_folder_beside_train_and_test_is_the_validation_split(tmp_path: Path) -> None:
    for name, n in (("train", 20), ("val", 5), ("test", 6)):
        make_folder(tmp_path / "in" / name, {"cat": n, "dog": n})
    manifest = prepare(Data(name="folder", path=str(tmp_path / "in"), image_size=8), tmp_path / "out")
    assert manifest["counts"] == {"train": 40, "val": 10, "test": 12}
    assert manifest["source_splits"] == {"train": "train", "val": "val", "test": "test"}


def test_test_path_gives_the_test_images(tmp_path: Path, flowers: Path, from_folder: Data) -> None:
    test = make_folder(tmp_path / "test", {"rose": 3, "aster": 2, "tulip": 4})
    config = replace(from_folder, test_path=str(make_zip(test, tmp_path / "test.zip", "test/")))
    manifest = prepare(config, tmp_path / "out")
    assert manifest["class_counts"]["test"] == [2, 3, 4]
    assert manifest["counts"]["train"] + manifest["counts"]["val"] == 60
    assert prepare(replace(config, test_images=6), tmp_path / "out")["counts"]["test"] == 6


def test_test_path_with_other_classes_is_refused(tmp_path: Path, from_folder: Data) -> None:
    test = make_folder(tmp_path / "test", {"rose": 3, "daisy": 2})
    text = error(replace(from_folder, test_path=str(test)), tmp_path / "out")
    assert "lack aster, tulip and add daisy" in text


def test_two_sets_of_test_images_are_refused(tmp_path: Path) -> None:
    for name in ("train", "test"):
        make_folder(tmp_path / "in" / name, {"cat": 4, "dog": 4})
    config = Data(name="folder", path=str(tmp_path / "in"), test_path=str(tmp_path / "in" / "test"))
    assert "leave one of them out" in error(config, tmp_path / "out")


MODES = [("RGB", "png"), ("L", "png"), ("LA", "png"), ("RGBA", "png"), ("P", "png"), ("1", "png"), ("CMYK", "jpg")]
MODES += [("L", "jpg"), ("RGB", "webp"), ("RGB", "bmp"), ("P", "gif"), ("RGB", "tiff"), ("CMYK", "tiff")]


def prepare_one(tmp_path: Path, name: str, raw: bytes, size: int = 8) -> torch.Tensor:
    """Pixels of one image in a set of ten equal ones."""
    for folder in "ab":
        (tmp_path / "in" / folder).mkdir(parents=True)
        for i in range(5):
            (tmp_path / "in" / folder / f"{i}{name}").write_bytes(raw)
    prepare(Data(name="folder", path=str(tmp_path / "in"), image_size=size), tmp_path / "out")
    return load(tmp_path / "out").splits["train"][0][0]


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "jpeg"}.get(kind, kind), **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("mode", "kind"), MODES)
def test_every_kind_of_image_becomes_rgb(tmp_path: Path, mode: str, kind: str) -> None:
    flat = Image.new("RGB", (9, 9), (255, 255, 255) if mode in ("1", "L", "LA") else (204, 51, 102)).convert(mode)
    pixels = prepare_one(tmp_path, f".{kind}", encoded(flat, kind))
    wanted = torch.tensor(flat.convert("RGB").getpixel((4, 4))).view(3, 1, 1)
    assert (pixels.int() - wanted).abs().max() <= 12  # JPEG and WebP lose a little


def test_a_palette_with_transparency_keeps_its_colours(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), (0, 200, 100)).quantize(4)
    pixels = prepare_one(tmp_path, ".png", encoded(image, "png", transparency=b"\x80\x00"))
    assert pixels[:, 0, 0].tolist() == [0, 200, 100]


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    pixels = prepare_one(tmp_path, ".png", encoded(Image.fromarray(ramp), "png"))
    assert pixels[0].tolist() == (ramp >> 8).tolist()


def test_pixels_without_a_known_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a/.\.tiff \(32-bit pixels"):
        prepare_one(tmp_path, ".tiff", encoded(Image.new("F", (8, 8), 0.5), "tiff"))


def test_a_rotated_photograph_stands_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 16))
    image.paste((255, 255, 255), (0, 0, 16, 8))  # white above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise: white at the right
    pixels = prepare_one(tmp_path, ".png", encoded(image, "png", exif=exif))
    assert pixels[0, :, -1].min() == 255
    assert pixels[0, :, 0].max() == 0


def test_the_centre_square_is_taken_and_an_image_of_the_right_size_is_untouched(tmp_path: Path) -> None:
    wide = Image.new("RGB", (32, 8), (255, 0, 0))
    middle = picture(40, (8, 8))
    wide.paste(middle, (12, 0))
    pixels = prepare_one(tmp_path, ".png", encoded(wide, "png"))
    assert torch.equal(pixels, torch.from_numpy(np.array(middle)).permute(2, 0, 1))


def test_images_shrink_with_antialiasing(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    pixels = prepare_one(tmp_path, ".png", encoded(Image.fromarray(stripes), "png"))
    assert (pixels.int() - 127).abs().max() <= 6


# Mistakes


def test_an_unknown_name_gets_the_nearest_right_one(tmp_path: Path) -> None:
    assert "did you mean 'cifar10'?" in error(Data(name="cifar-10"), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"image_size": 7}, "data.image_size is 7"),
        ({"pad": -1}, "data.pad is -1"),
        ({"train_images": -1}, "data.train_images is -1"),
        ({"val_images": 9}, "data.val_images is 9: one image per class is the least, 10 here"),
        ({"test_images": 0}, "data.test_images is 0"),
        (
            {"train_images": 1790},
            "test 60 + val 40 + train 1790 = 1890 images are more than the 1797 there are; lower data.test_images or",
        ),
        ({"val_images": 1900}, "are more than the 1797"),
        ({"train_images": None, "val_images": 1000, "test_images": 790}, "leave 7 of 1797 for train, 10 or more are needed"),
        ({"train_images": 1750, "test_images": None}, "leave 7 of 1797 for test"),
        ({"classes": (3, 12)}, "class 12 of 10; indices are 0 to 9"),
        ({"classes": (3, -1)}, "class -1 of 10"),
        ({"classes": (3, "three")}, "there is no class 'three'; the classes are 0, 1, 2"),
        ({"classes": (3, 4, "3")}, "names class '3' twice"),
        ({"classes": (3,)}, "2 classes or more"),
        ({"classes": ()}, "2 classes or more"),
        ({"path": "x"}, "reads no path"),
        ({"test_path": "x"}, "only data.name=folder or shards reads it"),
        ({"image_size": 10**6}, "200 images of 1000000 x 1000000 pixels need 600000.0 GB, the disk of"),
        ({"per_class": 3}, "data.per_class and data.train_images are both given"),
        ({"folds": 1, "fold": 0}, "data.folds is 1: 2 or more"),
        ({"folds": 3, "fold": 0}, "data.folds and data.val_images are both given"),
        ({"folds": 200, "fold": 0, "val_images": None}, "201 or more are needed"),
        ({"train_images": None, "per_class": 173}, "175 or more are needed"),
        ({"train_images": 1600, "folds": 5, "fold": 0, "val_images": None}, "data.train_images is 1600"),
        ({"classes": 1}, "a number of classes is from 2 to 10"),
    ],
)
def test_wrong_settings_are_told_in_one_line(tmp_path: Path, change: dict[str, object], part: str) -> None:
    assert part in error(replace(SMALL, **change), tmp_path / "out")


def test_wrong_paths_are_told_in_one_line(tmp_path: Path, flowers: Path) -> None:
    def told(path: Path | None) -> str:
        return error(Data(name="folder", path=None if path is None else str(path)), tmp_path / "out")

    assert "data.path is not given" in told(None)
    assert "there is no such folder or .zip file" in told(tmp_path / "nowhere")
    (tmp_path / "text.zip").write_text("no zip")
    assert "neither a folder nor a .zip file" in told(tmp_path / "text.zip")
    (tmp_path / "empty").mkdir()
    assert "no class folders" in told(tmp_path / "empty")
    assert "no class folders and 20 images outside them" in told(flowers / "rose")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    assert "no class folders" in told(tmp_path / "empty.zip")
    make_folder(tmp_path / "one", {"cat": 3})
    assert "one class folder (cat)" in told(tmp_path / "one")


def test_an_encrypted_zip_is_refused(tmp_path: Path, flowers: Path) -> None:
    raw = bytearray(make_zip(flowers, tmp_path / "x.zip").read_bytes())
    start = raw.index(b"PK\x01\x02", raw.index(b".png", raw.index(b"PK\x01\x02")))
    raw[start + 8] |= 1  # the flag in a file's entry of the central directory
    (tmp_path / "x.zip").write_bytes(raw)
    assert "encrypted" in error(Data(name="folder", path=str(tmp_path / "x.zip")), tmp_path / "out")


def test_an_empty_class_folder_is_named_and_can_be_left_out(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "in", {"cat": 8, "dog": 8, "emu": 0})
    for path in (root, make_zip(root, tmp_path / "in.zip")):
        config = Data(name="folder", path=str(path), image_size=8)
        assert "class 'emu' has 0 images" in error(config, tmp_path / "out")
        assert prepare(replace(config, classes=("dog", "cat")), tmp_path / "made")["classes"] == ["dog", "cat"]


def test_an_unknown_class_name_gets_the_nearest_right_one(tmp_path: Path, from_folder: Data) -> None:
    assert "did you mean 'tulip'?" in error(replace(from_folder, classes=("rose", "tulips")), tmp_path / "out")


def test_damaged_images_are_named_and_counted(tmp_path: Path, flowers: Path, from_folder: Data) -> None:
    root = shutil.copytree(flowers, tmp_path / "in")
    whole = encoded(picture(0, (64, 64)), "jpg")
    (root / "rose" / "000.jpg").write_bytes(whole[: len(whole) // 2])
    for i in range(3):
        (root / "tulip" / f"x{i}.png").write_text("not an image")
    for path in (root, make_zip(root, tmp_path / "in.zip")):
        text = error(replace(from_folder, path=str(path)), tmp_path / "out")
        assert text.startswith("cannot read 4 images: ")
        assert "data.unreadable=drop" in text
        assert "tulip/x2.png (not an image); " in text


def test_a_damaged_zip_entry_is_named(tmp_path: Path, flowers: Path, from_folder: Data) -> None:
    raw = bytearray(make_zip(flowers, tmp_path / "in.zip").read_bytes())
    raw[raw.index(b"rose/003.png") + 60] ^= 255
    (tmp_path / "in.zip").write_bytes(raw)
    assert "cannot read image rose/003.png (Bad CRC-32" in error(
        replace(from_folder, path=str(tmp_path / "in.zip")), tmp_path / "out"
    )


@pytest.mark.parametrize("limit", [100, 60])  # Pillow warns above its limit and raises above twice the limit
def test_a_decompression_bomb_is_an_error(
    tmp_path: Path, from_folder: Data, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # the images have 120
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "decompression bomb" in error(from_folder, tmp_path / "out")


# CIFAR


def fake_cifar(home: Path, kind: type, monkeypatch: pytest.MonkeyPatch, as_archive: bool = False) -> np.ndarray:
    """A small one in the real layout, and its checksums in torchvision's class; the training images (N, 3, 32, 32)."""
    rng, n = np.random.default_rng(0), 20
    folder = home / kind.base_folder
    folder.mkdir(parents=True)
    coarse = kind is datasets.CIFAR100
    classes = 100 if coarse else 10
    key = "fine_labels" if coarse else "labels"
    train, sums = [], {}
    for name, _ in kind.train_list + kind.test_list:
        count = n * (classes // 10)
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        sums[name] = dump(folder / name, {"data": pixels, key: [i % classes for i in range(count)]})
        train += [pixels] * (name not in [test for test, _ in kind.test_list])
    meta = kind.meta["filename"]
    names = [f"class{k}" for k in range(classes)]
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": dump(folder / meta, {kind.meta["key"]: names})})
    monkeypatch.setattr(kind, "train_list", [[name, sums[name]] for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [[name, sums[name]] for name, _ in kind.test_list])
    if as_archive:
        with tarfile.open(home / kind.filename, "w:gz") as archive:
            archive.add(folder, kind.base_folder)
        monkeypatch.setattr(kind, "tgz_md5", hashlib.md5((home / kind.filename).read_bytes()).hexdigest())
        shutil.rmtree(folder)
    return np.concatenate(train).reshape(-1, 3, 32, 32)


def dump(path: Path, content: dict[str, object]) -> str:
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


def no_network(*args: object, **kwargs: object) -> None:
    raise urllib.error.URLError("Network is unreachable")


@pytest.mark.parametrize("as_archive", [False, True])
@pytest.mark.parametrize(("name", "kind"), [("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)])
def test_cifar_is_read_from_disk_when_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: type, as_archive: bool
) -> None:
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    pixels = fake_cifar(tmp_path / "home", kind, monkeypatch, as_archive)
    least = SOURCES[name].classes
    manifest = prepare(Data(name=name, path=str(tmp_path / "home"), val_images=least), tmp_path / "out")
    assert manifest["counts"] == {"train": len(pixels) - least, "val": least, "test": 2 * least}
    assert (tuple(manifest["mean"]), tuple(manifest["std"])) == SOURCES[name].statistics
    assert manifest["augment"] == {"pad": 4, "flip": True, "crop": "pad"}
    ids, (images, labels) = ids_of(tmp_path / "out")["train"], load(tmp_path / "out").splits["train"]
    assert torch.equal(images, torch.from_numpy(pixels[ids]))
    assert labels.tolist() == [i % least for i in ids] if name == "cifar100" else labels.tolist() == [i % 20 % 10 for i in ids]


def test_cifar_is_resized_to_another_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cifar(tmp_path / "home", datasets.CIFAR10, monkeypatch)
    config = Data(name="cifar10", path=str(tmp_path / "home"))
    for size in (8, 40):
        manifest = prepare(replace(config, image_size=size), tmp_path / "out")
        images = load(tmp_path / "out").splits["train"][0]
        assert images.shape == (manifest["counts"]["train"], 3, size, size)
        assert abs(images.float().mean() - 127.5) < 3


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_without_a_network_cifar_says_which_file_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    (tmp_path / "home").mkdir()
    text = error(Data(name=name, path=str(tmp_path / "home")), tmp_path / "out")
    file = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}[name]
    assert f"put {file} from https://www.cs.toronto.edu/~kriz/{file} into {tmp_path / 'home'}" in text
    assert "Network is unreachable" in text


# Batches


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare(SMALL, out)
    return out


def loader(prepared: Path, batch_size: int, seed: int | None = 0, split: str = "train") -> Resident:
    manifest, splits, *_ = load(prepared)
    augment = Augment(2, True)
    return Resident(*splits[split], manifest["mean"], manifest["std"], batch_size, torch.device("cpu"), seed, augment)


def epoch(batches: Resident, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    found = list(batches.epoch(number))
    assert len(found) == len(batches)
    return tuple(torch.cat([batch[i] for batch in found]) for i in range(3))


def test_batches_do_not_depend_on_the_batch_size_and_hold_every_sample_once(prepared: Path) -> None:
    images, labels, ids = epoch(loader(prepared, 7), 3)
    for batch_size in (1, 32, 100, 1000):
        for a, b in zip(epoch(loader(prepared, batch_size), 3), (images, labels, ids), strict=True):
            assert torch.equal(a, b)
    assert sorted(ids.tolist()) == list(range(100))
    assert torch.equal(labels, load(prepared).splits["train"][1][ids])


def test_epochs_and_seeds_differ_and_repeat(prepared: Path) -> None:
    runs = {(seed, number): epoch(loader(prepared, 32, seed), number) for seed in (0, 1) for number in (1, 2)}
    images = [run[0] for run in runs.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])
    assert torch.equal(epoch(loader(prepared, 32, 1), 2)[0], runs[1, 2][0])


def test_without_a_seed_batches_are_the_split_itself_normalised(prepared: Path) -> None:
    manifest, splits, *_ = load(prepared)
    images, labels, ids = epoch(loader(prepared, 32, None, "test"), 5)
    mean, std = torch.tensor(manifest["mean"]).view(3, 1, 1), torch.tensor(manifest["std"]).view(3, 1, 1)
    torch.testing.assert_close(images, (splits["test"][0] / 255 - mean) / std, rtol=0, atol=1e-5)
    assert torch.equal(labels, splits["test"][1])
    assert ids.tolist() == list(range(60))


def test_normalised_training_images_have_mean_zero_and_std_one(prepared: Path) -> None:
    images, _, _ = epoch(loader(prepared, 32, None), 0)
    assert images.mean((0, 2, 3)).abs().max() < 1e-4
    assert (images.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_the_crop_is_a_slice_of_the_padded_image() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (25, 3, 6, 9), dtype=torch.uint8, generator=generator)
    corners = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    for image, corner, found in zip(images, corners.tolist(), crop(images, corners, 2), strict=True):
        padded = torch.zeros(3, 10, 13, dtype=torch.uint8)
        padded[:, 2:8, 2:11] = image
        assert torch.equal(found, padded[:, corner[0] : corner[0] + 6, corner[1] : corner[1] + 9])


def test_augmented_images_are_the_crop_and_flip_that_were_drawn_for_their_id(prepared: Path) -> None:
    batches = loader(prepared, 32)
    plain, _, _ = epoch(loader(prepared, 32, None), 0)
    images, _, ids = epoch(batches, 4)
    corners, flips = moves(Augment(2, True), 0, 4, torch.arange(100))
    zero = batches.shift  # a padded pixel is black before it is normalised
    for image, i in zip(images, ids.tolist(), strict=True):
        padded = zero.expand(3, 12, 12).clone()
        padded[:, 2:10, 2:10] = plain[i]
        row, col = corners[i].tolist()
        wanted = padded[:, row : row + 8, col : col + 8]
        torch.testing.assert_close(image, wanted.flip(2) if flips[i] else wanted)
    assert 20 < flips.sum() < 80


def test_a_folder_s_fingerprint_follows_its_files_and_not_their_place(tmp_path: Path) -> None:
    for root in ("here", "there"):
        for k, name in enumerate(("cat", "dog")):
            (tmp_path / root / name).mkdir(parents=True)
            Image.new("RGB", (9, 9), (90 * k, 0, 0)).save(tmp_path / root / name / "a.png")
    here, there = (SOURCES["folder"].load(Data(name="folder", path=str(tmp_path / root))) for root in ("here", "there"))
    assert here.fingerprint == there.fingerprint is not None
    Image.new("RGB", (9, 9)).save(tmp_path / "there" / "dog" / "b.png")
    changed = SOURCES["folder"].load(Data(name="folder", path=str(tmp_path / "there")))
    assert changed.fingerprint != here.fingerprint
