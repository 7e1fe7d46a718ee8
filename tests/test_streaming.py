"""Data sets larger than memory: prepared block by block, trained from disk, with the bits of training from memory."""

import dataclasses
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pupil.data import Data, load, memory, prepare
from pupil.data.dali import Dali
from pupil.data.resident import Augment, Resident, Streamed
from pupil.data.workers import Workers
from pupil.methods.alone import Alone
from pupil.models import build
from pupil.optim import Optim
from pupil.types import UserError
from tests import tiny

CPU = torch.device("cpu")
SIZE, IMAGES = 224, 3000  # 452 MB of pixels

PREPARING = """
import matplotlib.backends.backend_agg, matplotlib.figure, PIL.PngImagePlugin  # the report's libraries are not measured
from pathlib import Path
from pupil.data import Data, prepare
before = peak()
prepare(Data(name="folder", path=sys.argv[1], image_size=224), Path(sys.argv[2]))
print(peak() - before)
"""
TRAINING = """
import hashlib, torch
from pathlib import Path
from pupil.data import load, memory
from pupil.data.resident import Augment
data, cpu = load(Path(sys.argv[1])), torch.device("cpu")
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.AvgPool2d(32), torch.nn.Flatten(), torch.nn.Linear(147, 2))
optimizer = torch.optim.SGD(net.parameters(), 0.01)
def step(images, labels):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(net(images), labels).backward()
    optimizer.step()
step(torch.zeros(1, 3, 224, 224), torch.zeros(1, dtype=torch.int64))  # what torch loads at its first step is not measured
before = peak()
kind = memory.choose(sys.argv[2], 0, cpu).train
batches = kind(data.pixels["train"], data.splits["train"][1], (0.5,) * 3, (0.25,) * 3, 8, cpu, 0, Augment(4, True))
for batch in batches.epoch(1):
    step(batch.images, batch.labels)
print(peak() - before, hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in net.parameters())).hexdigest())
"""
PEAK = """
import re, sys
def peak():  # bytes; of this process alone, unlike what getrusage says of a child
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def alone(code: str, *args: str) -> list[str]:
    """What a process of its own prints."""
    done = subprocess.run([sys.executable, "-c", PEAK + code, *args], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures with Linux's /proc")
def test_a_set_is_prepared_and_trained_in_less_memory_than_it_takes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(IMAGES // 2):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "in" / name / f"{i}.png")
    pixels = 3 * SIZE**2 * IMAGES
    (preparing,) = alone(PREPARING, str(tmp_path / "in"), str(tmp_path / "out"))
    assert int(preparing) < pixels / 2, "a few blocks and the pictures of the report"
    training = {loader: alone(TRAINING, str(tmp_path / "out"), loader) for loader in ("resident", "streamed")}
    train = load(tmp_path / "out").pixels["train"].bytes
    assert int(training["resident"][0]) > train, "the measure sees pixels that are in memory"
    assert int(training["streamed"][0]) < train / 2
    assert training["resident"][1] == training["streamed"][1], "the same weights, bit for bit"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("streaming") / "out"
    prepare(Data(train_images=50, val_images=20, test_images=30, image_size=16), out)
    return out


def loader(kind: type[Resident], folder: Path, split: str, seed: int | None, batch_size: int = 16) -> Resident:
    data = load(folder)
    m = data.manifest
    return kind(data.pixels[split], data.splits[split][1], m["mean"], m["std"], batch_size, CPU, seed, Augment(2, True))


@pytest.mark.parametrize(("split", "seed"), [("train", 0), ("train", 1), ("test", None)])
@pytest.mark.parametrize("batch_size", [1, 16, 1000])
def test_batches_from_disk_are_those_from_memory(digits: Path, split: str, seed: int | None, batch_size: int) -> None:
    for number in (0, 1, 7):
        ours, theirs = (list(loader(kind, digits, split, seed, batch_size).epoch(number)) for kind in (Streamed, Resident))
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


def test_training_from_disk_leaves_the_same_weights(digits: Path) -> None:
    found = []
    for kind in (Resident, Streamed):
        torch.manual_seed(0)
        method = Alone(build("resnet8", 10))
        feeds = loader(kind, digits, "train", 0), loader(kind, digits, "val", None)
        found.append(tiny.fit(method, None, *feeds, Optim(epochs=2, lr=0.01, milestones=()), tiny.quiet, tiny.silently).last)
    assert tiny.same(*found)


def test_an_epoch_that_is_left_early_leaves_no_reader_behind(digits: Path) -> None:
    before = threading.active_count()
    epoch = loader(Streamed, digits, "train", 0, 1).epoch(1)
    next(epoch)
    assert threading.active_count() > before
    del epoch
    assert threading.active_count() == before


def test_a_loader_is_chosen_by_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000_000_000)
    small, large = 499_000_000, 500_000_000
    assert [memory.choose("auto", need, CPU)[:2] for need in (small, large)] == [(Resident, Resident), (Streamed, Streamed)]
    assert [memory.choose(name, large, CPU)[:2] for name in ("resident", "streamed")] == [
        (Resident, Resident),
        (Streamed, Streamed),
    ]
    assert [memory.choose("workers", need, CPU)[:2] for need in (small, large)] == [(Workers, Resident), (Workers, Streamed)]
    told = memory.choose("auto", large, CPU).why
    assert told == "images read from disk batch by batch (loader auto): 500 MB, of 1,000 MB free on cpu"
    monkeypatch.undo()
    assert memory.free_memory(CPU) > 0


def test_resized_crops_are_made_by_dali_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "installed", lambda: True)
    chosen = memory.choose("auto", 0, CPU, resized=True)
    assert chosen == (Dali, Resident, "images decoded by DALI (loader auto): random resized crops, and DALI is installed")
    assert memory.choose("auto", 0, CPU, resized=True, two_views=True).train is Workers
    for loader in ("resident", "streamed"):
        with pytest.raises(UserError, match=f"loader: {loader} keeps pixels of one size"):
            memory.choose(loader, 0, CPU, resized=True)
    monkeypatch.setattr(memory, "installed", lambda: False)
    kind, _, why = memory.choose("auto", 0, CPU, resized=True)
    assert (kind, why.partition(": ")[2]) == (Workers, "random resized crops, and DALI is not installed")
    with pytest.raises(UserError, match="dali was asked for, but nvidia-dali-cuda120 is not installed"):
        memory.choose("dali", 0, CPU)


def test_a_file_with_images_left_out_can_be_read_by_safetensors(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(9):
            Image.new("RGB", (8, 8), (20 * i, 99, 0)).save(tmp_path / "in" / name / f"{i}.png")
    (tmp_path / "in" / "a" / "3.png").write_bytes(b"no image")
    config = Data(name="folder", path=str(tmp_path / "in"), image_size=8)
    manifest = prepare(dataclasses.replace(config, unreadable="drop"), tmp_path / "out")
    images, total = load(tmp_path / "out").splits, 0
    for name, (pixels, labels) in images.items():
        found = load_file(tmp_path / "out" / f"{name}.safetensors")
        assert torch.equal(found["images"], pixels)
        assert torch.equal(found["labels"], labels)
        total += len(found["source_ids"])
    assert total == sum(manifest["counts"].values()) == 17
