"""Every loader shows the same images: pixels of one size to the bit, decoded and resized files up to DALI's rounding."""

import io
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from pupil.data import Data, load, prepare
from pupil.data.augment import Augment
from pupil.data.batches import Batches, Shard
from pupil.data.dali import installed
from pupil.data.encoded import Encoded, opened
from pupil.data.memory import KINDS
from pupil.data.prepare import Prepared, recipe
from pupil.data.resized import cut, cuts
from pupil.data.sources import RESIZED
from pupil.methods.alone import Alone
from pupil.models import build
from pupil.net import Net
from pupil.optim import Optim
from pupil.types import Batch, UserError
from tests import tiny

CPU = torch.device("cpu")
SIZE = 32
needs_dali = pytest.mark.skipif(not installed(), reason="DALI is not installed")
KIND = [pytest.param(name, marks=needs_dali) if name == "dali" else name for name in KINDS]
FROM_FILES = [name for name in KIND if name not in ("resident", "streamed")]


def picture(rng: np.random.Generator, w: int, h: int, k: int) -> Image.Image:
    """Smooth, with some noise, as photographs are; its colour tells the class k."""
    coarse = rng.integers(0, 160, (max(2, h // 12), max(2, w // 12), 3), dtype=np.uint8)
    fine = np.asarray(Image.fromarray(coarse).resize((w, h), Image.Resampling.BICUBIC)).astype(int)
    fine[..., k % 3] += 60
    return Image.fromarray((fine + rng.integers(-12, 13, (h, w, 3))).clip(0, 255).astype(np.uint8))


def save(image: Image.Image, path: Path, **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of mixed sizes, among them grey, CMYK, turned by EXIF, and one that is broken; PNGs of odd kinds."""
    root, rng = tmp_path_factory.mktemp("jpegs"), np.random.default_rng(0)
    turned = Image.Exif()
    turned[0x0112] = 6
    for split, number in (("train", 20), ("val", 6)):
        for k, name in enumerate(("ash", "birch", "cedar")):
            for i in range(number):
                w, h = (int(x) for x in rng.integers(25, 160, 2))
                save(picture(rng, w, h, k), root / split / name / f"{i:02}.jpg", quality=90, subsampling=2 * (i % 2))
    at = root / "train/ash"
    odd = picture(rng, 70, 50, 0)
    save(odd.convert("L"), at / "00.jpg")
    save(odd.convert("CMYK"), at / "01.jpg")
    save(odd, at / "02.jpg", exif=turned)
    odd.putalpha(100)
    save(odd, at / "03.png")
    save(odd.convert("P"), at / "04.png")
    save(odd.convert("RGB"), at / "05.bmp")
    save(picture(rng, 10, 150, 0), at / "06.jpg")
    (root / "train/cedar/broken.jpg").write_bytes((root / "train/cedar/03.jpg").read_bytes()[:300])
    return root


@pytest.fixture(scope="module")
def prepared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    out = tmp_path_factory.mktemp("resized") / "out"
    config = Data(name="folder", path=str(folder), image_size=SIZE, crop="resized", val_images=6, unreadable="drop")
    prepare(config, out)
    assert sorted(path.suffix for path in out.iterdir() if path.is_file()) == [".json"] * 2 + [".png"] + 3 * [
        ".safetensors"
    ] + [".txt"]
    return load(out)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    out = tmp_path_factory.mktemp("digits") / "out"
    prepare(Data(train_images=50, val_images=20, test_images=30, image_size=16), out)
    return load(out)


def loader(
    kind: str,
    data: Prepared,
    seed: int | None = 0,
    batch_size: int = 16,
    two: bool = False,
    shard: Shard = Shard(),
    **more: Any,
) -> Batches:
    m = data.manifest
    augment = Augment(2, True) if m["augment"]["crop"] == "pad" else Augment(**m["augment"])
    about = (data.pixels["train"], data.splits["train"][1], m["mean"], m["std"], batch_size, CPU, seed, augment, two, shard)
    return KINDS[kind](*about, **more)


def levels(batches: Batches, images: Tensor) -> Tensor:
    """Normalised images as 0..255 again."""
    return (images - batches.shift) / batches.scale


# --- pixels of one size -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KIND)
@pytest.mark.parametrize(("seed", "batch_size"), [(0, 16), (1, 7), (None, 50)])
def test_padded_crops_are_the_same_bits_from_every_loader(
    digits: Prepared, kind: str, seed: int | None, batch_size: int
) -> None:
    ours, reference = loader(kind, digits, seed, batch_size), loader("resident", digits, seed, batch_size)
    for number in (1, 2):
        same_batches(list(ours.epoch(number)), list(reference.epoch(number)))


@pytest.mark.parametrize("kind", KIND)
def test_training_computes_the_same_bits_with_every_loader(digits: Prepared, kind: str) -> None:
    def trained(train: Batches) -> Net:
        torch.manual_seed(0)
        alone, optim = Alone(build("resnet8", 10)), Optim(epochs=1, batch_size=16, lr=0.05)
        tiny.fit(alone, None, train, loader("resident", digits, None, 50), optim, tiny.quiet, tiny.silently)
        return alone.student

    ours, reference = (trained(loader(name, digits)) for name in (kind, "resident"))
    assert tiny.same(tiny.state(ours), tiny.state(reference))


def same_batches(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.images, b.images)
        assert a.images.stride() == b.images.stride(), "or convolutions would choose another way to sum"
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.ids, b.ids)
        assert a.epoch == b.epoch


def test_workers_make_the_second_view_of_the_others(digits: Prepared) -> None:
    ours, theirs = (list(loader(kind, digits, two=True).epoch(1)) for kind in ("workers", "resident"))
    for a, b in zip(ours, theirs, strict=True):
        assert a.strong is not None
        assert b.strong is not None
        assert torch.equal(a.strong, b.strong)


@pytest.mark.parametrize("kind", KIND)
def test_few_views_are_the_first_epochs_images_by_turns_in_every_epochs_own_order(digits: Prepared, kind: str) -> None:
    same_views(kind, digits)
    for number in (1, 2, 3):
        same_batches(
            list(loader(kind, digits, 1, views=2).epoch(number)), list(loader("resident", digits, 1, views=2).epoch(number))
        )


def same_views(kind: str, data: Prepared) -> None:
    """Every loader with two views, against itself without."""
    few, free = loader(kind, data, 1, views=2), loader(kind, data, 1)
    first_seed = [by_id(loader(kind, data), number) for number in (2, 1, 2, 1, 2)]  # of epochs 0 to 4
    for number, expected in enumerate(first_seed):
        found = by_id(few, number)
        assert list(found) == list(by_id(free, number)), "the order is the seed's and the epoch's"
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[i], image) for i, image in expected.items())
    batches = list(few.epoch(3))
    assert {b.epoch for b in batches} == {3}
    rest = list(few.epoch(3, 1))
    assert torch.equal(rest[0].images, batches[1].images)


# --- encoded images ---------------------------------------------------------------------------------------------------------


def test_odd_files_are_kept_as_what_is_seen_and_broken_ones_are_listed(folder: Path, prepared: Prepared) -> None:
    files: Encoded = prepared.pixels["train"]
    counts = prepared.manifest["counts"]
    assert counts["train"] == len(files.ends) == len(files.sizes)
    assert counts["train"] + counts["val"] == 3 * 20 + 3
    (line,) = prepared.manifest["unreadable"]
    assert line.startswith("train/cedar/broken.jpg")
    sizes = []
    for raw in files.files(range(len(files.ends))):
        with Image.open(io.BytesIO(raw)) as image:
            sizes.append(image.size)
            assert image.format in ("JPEG", "PNG")
            assert image.mode in ("RGB", "L")
            assert image.getexif().get(0x0112, 1) == 1
    assert sizes == [tuple(size) for size in files.sizes.tolist()]


def test_evaluation_is_torchvisions_resize_and_centre_crop(folder: Path, tmp_path: Path) -> None:
    for size, shorter in ((224, 256), (32, 37)):
        config = Data(name="folder", path=str(folder), image_size=size, crop="resized", val_images=6, unreadable="drop")
        prepare(config, tmp_path / str(size))
        images, labels = load(tmp_path / str(size)).splits["test"]
        names = sorted((folder / "val").rglob("*.jpg"))
        assert len(names) == len(images) == len(labels) == 18
        see = v2.Compose([v2.Resize(shorter), v2.CenterCrop(size), v2.PILToTensor()])
        for name, image in zip(names, images, strict=True):
            assert torch.equal(image, see(Image.open(name).convert("RGB"))), name


def test_a_cut_is_torchvisions_resized_crop(prepared: Prepared) -> None:
    files: Encoded = prepared.pixels["train"]
    ids = torch.arange(len(files.ends))
    windows, flips = cuts(files.sizes, RESIZED, 3, 2, ids)
    assert 0.2 < flips.float().mean() < 0.8
    for raw, window, flip in zip(files.files(ids.tolist()), windows.tolist(), flips.tolist(), strict=True):
        image = opened(raw)
        theirs = F.resized_crop(image, *window, [SIZE, SIZE])
        assert cut(image, window, flip, SIZE).tobytes() == (F.horizontal_flip(theirs) if flip else theirs).tobytes()


SIMKD = RESIZED._replace(scale=(0.1, 1.0), ratio=(0.8, 1.25))


@pytest.mark.parametrize("augment", [RESIZED, SIMKD], ids=["default", "simkd"])
@pytest.mark.parametrize(("w", "h"), [(500, 375), (100, 100), (40, 300), (600, 50), (3, 2), (1, 1)])
def test_windows_are_distributed_as_torchvisions(w: int, h: int, augment: Augment) -> None:
    """Kolmogorov-Smirnov over each coordinate, against RandomResizedCrop itself."""
    n = 3000
    ours = cuts(torch.tensor([[w, h]]).expand(n, 2), augment, 0, 1, torch.arange(n)).windows
    assert (ours >= torch.tensor([0, 0, 1, 1])).all()
    assert (ours[:, 0] + ours[:, 2]).max() <= h
    assert (ours[:, 1] + ours[:, 3]).max() <= w
    torch.manual_seed(0)
    image = torch.empty(3, h, w)
    crop = v2.RandomResizedCrop(8, augment.scale, augment.ratio)
    found = [crop.make_params([image]) for _ in range(n)]
    theirs = torch.tensor([[p[k] for k in ("top", "left", "height", "width")] for p in found])
    for a, b in zip(ours.T, theirs.T, strict=True):
        values = torch.cat([a, b]).unique()
        gap = (
            torch.searchsorted(a.sort().values, values, right=True) - torch.searchsorted(b.sort().values, values, right=True)
        ).abs()
        assert gap.max() / n < 1.95 * (2 / n) ** 0.5, "two samples of one distribution stay below this in 999 of 1000 cases"
    if (w, h) == (40, 300):
        height = round(40 / augment.ratio[0])
        assert (ours == torch.tensor([(300 - height) // 2, 0, height, 40])).all(1).any(), "fallback"


@pytest.mark.parametrize("kind", FROM_FILES)
@pytest.mark.parametrize("batch_size", [1, 16, 1000])
def test_epochs_are_whole_and_last_batches_exact(prepared: Prepared, kind: str, batch_size: int) -> None:
    batches, labels = loader(kind, prepared, 0, batch_size), prepared.splits["train"][1]
    n = len(labels)
    for number in (1, 2):
        found = list(batches.epoch(number))
        assert [len(b.ids) for b in found] == [batch_size] * (n // batch_size) + [n % batch_size] * (n % batch_size > 0)
        assert len(found) == len(batches)
        ids = torch.cat([b.ids for b in found])
        assert sorted(ids.tolist()) == list(range(n))
        assert torch.equal(torch.cat([b.labels for b in found]), labels[ids])
        assert {b.images.shape[1:] for b in found} == {(3, SIZE, SIZE)}
        assert {b.images.dtype for b in found} == {torch.float32}


def by_id(batches: Batches, number: int, first: int = 0) -> dict[int, Tensor]:
    return {i: image for b in batches.epoch(number, first) for i, image in zip(b.ids.tolist(), b.images, strict=True)}


@pytest.mark.parametrize("kind", FROM_FILES)
def test_other_batches_shards_and_resumed_epochs_show_the_same_images(prepared: Prepared, kind: str) -> None:
    whole = by_id(loader(kind, prepared), 1)
    for shown in (by_id(loader(kind, prepared, 0, 5), 1), by_id(loader(kind, prepared, 0, 16, False, Shard(1, 3)), 1)):
        assert shown
        assert all(torch.equal(whole[i], image) for i, image in shown.items())
    rest = by_id(loader(kind, prepared), 1, 2)
    assert list(rest) == list(whole)[32:]
    assert all(torch.equal(whole[i], image) for i, image in rest.items())
    for other in (by_id(loader(kind, prepared), 2), by_id(loader(kind, prepared, 1), 1)):
        assert list(other) != list(whole)
        assert sum(torch.equal(whole[i], image) for i, image in other.items()) <= 1, (
            "one is too narrow for any window but its own"
        )


@pytest.mark.parametrize("kind", FROM_FILES)
def test_few_views_of_files_too(prepared: Prepared, kind: str) -> None:
    same_views(kind, prepared)


@needs_dali
@pytest.mark.parametrize("seed", [0, None])
def test_dali_decodes_and_resizes_as_pillow_up_to_rounding(prepared: Prepared, seed: int | None) -> None:
    """Measured: a fifth of a level in the mean, four levels at most, of 255."""
    ours, theirs = loader("dali", prepared, seed), loader("workers", prepared, seed)
    for number in (1, 2):
        for a, b in zip(ours.epoch(number), theirs.epoch(number), strict=True):
            assert torch.equal(a.ids, b.ids)
            gap = (levels(ours, a.images) - levels(theirs, b.images)).abs()
            assert gap.mean() < 0.3
            assert gap.max() < 5.5


def test_an_epoch_that_is_left_early_leaves_no_process_behind(prepared: Prepared) -> None:
    epoch = loader("workers", prepared, 0, 1).epoch(1)
    next(epoch)
    assert multiprocessing.active_children()
    del epoch
    assert not multiprocessing.active_children()


def test_making_batches_draws_no_number_of_the_trainings_own(prepared: Prepared) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader("workers", prepared).epoch(1))
    assert torch.equal(before, torch.get_rng_state())


@needs_dali
def test_dali_has_no_second_view_and_says_so(prepared: Prepared) -> None:
    with pytest.raises(UserError, match=r"dali makes one view .* use auto or workers"):
        loader("dali", prepared, two=True)


def test_two_views_of_files_are_two_windows(prepared: Prepared) -> None:
    for a, b in zip(loader("workers", prepared, two=True).epoch(1), loader("workers", prepared).epoch(1), strict=True):
        assert a.strong is not None
        assert torch.equal(a.images, b.images)
        assert not torch.equal(a.images, a.strong)


def test_crops_are_the_data_sets_own_unless_others_are_asked_for() -> None:
    for config, wanted in (
        (Data(name="imagenet"), (0, True, "resized")),
        (Data(name="imagenet", pad=4, flip=False), (4, False, "pad")),
        (Data(name="imagenet", crop="pad"), (0, True, "pad")),
        (Data(name="folder"), (4, True, "pad")),
        (Data(name="folder", crop="resized"), (0, True, "resized")),
    ):
        assert recipe(config)[:3] == wanted


def test_crops_of_arrays_are_refused(tmp_path: Path) -> None:
    for config, text in (
        (Data(crop="resized"), "digits comes as pixels of one size; use pad"),
        (Data(crop="resize"), "data.crop is 'resize'"),
        (Data(name="folder", path=".", crop="resized", pad=4), "data.pad is 4, which random resized crops do not have"),
    ):
        with pytest.raises(UserError, match=text):
            prepare(config, tmp_path / "out")


@needs_dali
@pytest.mark.slow
def test_a_network_is_as_good_on_what_dali_shows_as_on_what_pillow_shows(tmp_path: Path) -> None:
    """Within 0.2 points over six epochs of crops; of two trainings that differ in rounding README.md tells."""
    rng, root = np.random.default_rng(1), tmp_path / "in"
    for split, number in (("train", 110), ("test", 200)):
        for k in range(3):
            for i in range(number):
                pixels = np.asarray(picture(rng, 60, 50, 0)).astype(int)
                pixels[:, :, k] += 12  # the classes
                save(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), root / split / "abc"[k] / f"{i}.jpg", quality=90)
    prepare(Data(name="folder", path=str(root), image_size=16, crop="resized", val_images=30), tmp_path / "out")
    data = load(tmp_path / "out")
    m = data.manifest
    test = KINDS["resident"](data.pixels["test"], data.splits["test"][1], m["mean"], m["std"], 600, CPU)
    torch.manual_seed(0)
    optim = Optim(epochs=6, batch_size=30, lr=0.05, schedule="cosine")
    method = Alone(build("resnet8", 3))
    tiny.fit(method, None, loader("workers", data, 0, 30), test, optim, tiny.quiet, tiny.silently)
    found = {}
    for kind in ("workers", "dali"):
        shown = loader(kind, data, 1, 300)
        answers = [predict_one(method.student.eval(), batch) for number in range(6) for batch in shown.epoch(number)]
        found[kind] = 100 * torch.cat(answers).float().mean().item()
    assert 50 < found["workers"] < 95, "a task that is neither hopeless nor done"
    assert found["dali"] == pytest.approx(found["workers"], abs=0.2)


@torch.no_grad()
def predict_one(net: Net, batch: Batch) -> Tensor:
    """Which images it answers right."""
    return net(batch.images).argmax(1) == batch.labels


def test_ranges_of_resized_crops_are_settings(folder: Path, tmp_path: Path) -> None:
    config = Data(name="folder", path=str(folder), image_size=SIZE, crop="resized", unreadable="drop")
    manifest = prepare(replace(config, scale=(0.5, 0.9), ratio=(1.0, 1.0)), tmp_path / "data")
    assert manifest["augment"] == {"pad": 0, "flip": True, "crop": "resized", "scale": [0.5, 0.9], "ratio": [1.0, 1.0]}
    data = load(tmp_path / "data")
    files, augment = data.pixels["train"], Augment(**data.manifest["augment"])
    windows = cuts(files.sizes, augment, 0, 1, torch.arange(len(files.ends))).windows
    inside = windows[:, 2] < torch.minimum(files.sizes[:, 0], files.sizes[:, 1])  # not the fallback
    assert inside.any()
    assert torch.equal(windows[inside, 2], windows[inside, 3])
    for wrong, line in (
        ({"scale": (0.5, 1.5)}, r"data.scale is \[0.5, 1.5\]: from and to, such as \[0.08, 1.0\]"),
        ({"ratio": (2.0, 1.0)}, "data.ratio is"),
        ({"ratio": (1.0,)}, "data.ratio is"),
        ({"scale": (0.1, 1.0), "crop": "pad"}, "data.scale is of random resized crops, and these are padded"),
    ):
        with pytest.raises(UserError, match=line):
            prepare(replace(config, **wrong), tmp_path / "data")
