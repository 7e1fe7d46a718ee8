"""What `python -m pupil check` foretells is what comes: images of each split, bytes of banks and of a step, time."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.losses import peak

from pupil import estimate, inspection, outline
from pupil.data import Data
from pupil.data.base import Content, Images, Pool, Tick
from pupil.data.draw import draw
from pupil.fit import activate, step
from pupil.methods import METHODS
from pupil.methods.base import Setup
from pupil.net import probe
from pupil.optim import Optim, make_optimizer
from pupil.settings import Settings
from tests import tiny

CPU = torch.device("cpu")


def unread(ids: torch.Tensor, tick: Tick) -> Images:
    raise AssertionError("nothing is read")


def content(train: int, val: int = 0, test: int = 0, rest_is_test: bool = False) -> Content:
    pools = [Pool(torch.arange(n) % 5, unread) if n else None for n in (train, val, test)]
    assert pools[0] is not None
    return Content(tuple("abcde"), pools[0], pools[1], pools[2], rest_is_test)


@pytest.mark.parametrize(
    "config",
    [
        Data(),
        Data(train_images=50),
        Data(per_class=7),
        Data(val_images=20, test_images=30),
        Data(folds=4, fold=1),
        Data(folds=4, fold=0, train_images=40),
    ],
    ids=str,
)
@pytest.mark.parametrize("around", [{}, {"test": 60}, {"val": 40, "test": 60}, {"rest_is_test": True}], ids=str)
def test_counts_are_those_of_the_draw(config: Data, around: dict[str, Any]) -> None:
    if config.folds and "val" in around:
        around = {"test": 60}  # else it is refused
    held = content(500, **around)
    drawn = {name: len(part.ids) for name, part in draw(config, held, [0, 1, 2, 3, 4]).items()}
    assert estimate.counts(config, held, 5, 1.0) == drawn


def test_counts_of_published_sets_need_no_images() -> None:
    assert estimate.counts(Data(name="cifar100"), None, 100, 1.0) == {"train": 45_000, "val": 5_000, "test": 10_000}
    assert estimate.counts(Data(name="cifar100"), None, 20, 0.2) == {"train": 9_000, "val": 1_000, "test": 2_000}
    imagenet = estimate.counts(Data(name="imagenet", val_images=1000), None, 1000, 1.0)
    assert imagenet == {"train": 1_280_167, "val": 1000, "test": 50_000}
    assert estimate.counts(Data(name="digits", train_images=128, val_images=128), None, 10, 1.0)["test"] == 1541


@pytest.mark.parametrize(("images", "batch"), [(1000, 64), (1_280_167, 256), (50_001, 64), (20_480, 64)])
def test_few_images_leave_as_large_a_last_batch(images: int, batch: int) -> None:
    few = estimate.few(images, batch)
    assert few % batch == images % batch
    assert few <= max(estimate.MANY + batch, 1) or few == images


def test_memory_banks_of_all_images_are_foretold_from_few() -> None:
    def made(n: int) -> Any:
        around = tiny.setup()
        s, t = (probe(net, tiny.SIZE) for net in (around.student, around.teacher))
        setup = Setup(around.student, around.teacher, s, t, torch.arange(n) % tiny.CLASSES, 8)
        return METHODS["crd"](setup, METHODS["crd"].Config(k=16, dim=8))

    few, all_of_them = made(200), made(1700)
    foretold = estimate.memory(few, few.teacher, 0, 200, 1700)
    banks = [all_of_them.bank_s, all_of_them.bank_t, all_of_them.by_class]
    assert foretold.banks == estimate.nbytes(banks)
    assert foretold == estimate.memory(all_of_them, all_of_them.teacher, 0, 1700, 1700)
    trained = estimate.nbytes(all_of_them.parameters())
    assert foretold.training == 2 * trained, "a gradient and a momentum of each weight"


@pytest.mark.parametrize(("name", "batch"), [("kd", 32), ("simkd", 32), ("at", 16), ("crd", 32)])
def test_memory_of_a_step_is_about_what_is_allocated(name: str, batch: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Between the foretold and twice that: beside what a step keeps it allocates for a while."""
    method = tiny.make(name, {"kl": 1.0})
    about = outline.Outline(tiny.CLASSES, tiny.CLASSES, False, None, 32, {"train": tiny.SAMPLES, "val": 5, "test": 5}, "")
    found: list[estimate.Memory] = []

    def kept(*args: Any) -> estimate.Memory:
        found.append(estimate.Memory(*estimate_memory(*args)))
        return found[-1]

    estimate_memory = estimate.memory
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "memory", kept)
        inspection.print_step(name, method, method.teacher, about, batch)
    phase = method.phases()[-1]
    activate(method, phase)
    sgd, _ = make_optimizer(phase, Optim(lr=1e-6))
    x = torch.randn(batch, 3, 32, 32)
    made = tiny.first_batch()._replace(images=x, labels=torch.arange(batch) % 4, ids=torch.arange(batch) % tiny.SAMPLES)

    def run() -> None:
        step(method, method.teacher.features(x), made, phase, sgd)

    run()  # momentum is there from now on
    measured = peak(run, SimpleNamespace(wrt=[]), "cpu") * 2**20  # pyright: ignore[reportArgumentType]
    assert 0.6 * found[0].activations < measured < 2 * found[0].activations + found[0].training
    assert f"to train at batch size {batch}" in capsys.readouterr().out


def test_pace_is_that_of_a_part_of_a_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which every image takes a tenth of a second."""
    clock = [0.0]

    def slow(method: Any, t: Any, batch: Any, *rest: Any) -> None:
        clock[0] += 0.1 * len(batch.images)

    monkeypatch.setattr(estimate, "step", slow)
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: clock[0])
    for batch_size, tried in ((4, 4), (10, 10), (64, 16)):
        method, settings = tiny.make("kd"), Settings(optim=Optim(batch_size=batch_size))
        found = estimate.pace(method, method.teacher, settings, tiny.SIZE, tiny.CLASSES, CPU)
        assert found.tried == tried
        assert found.seconds == pytest.approx(0.1 * batch_size)
        assert found.of(10 * batch_size + 1) == pytest.approx(1.1 * batch_size)
    assert str(found) == "6,400 ms a step by steps of 16 images"


def test_check_foretells_time_where_it_is_asked_to(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outline, "find", lambda path: estimate.Path("nowhere"))
    data = Data(train_images=40, val_images=10, test_images=20, image_size=16)
    settings = Settings(data=data, teachers=("resnet14",), methods=("kd", "simkd"), seeds=(0, 1), device="cpu")
    inspection.check(settings)
    quick = capsys.readouterr().out
    assert "{'train': 40, 'val': 10, 'test': 20} images of 16 pixels" in quick
    assert " ms a step" not in quick
    assert "for the weights of 7 networks, 0 MiB for their answers" in quick
    inspection.check(settings, timed=True)
    timed = capsys.readouterr().out
    assert timed.count(" ms a step") == 4, "a teacher, a baseline, two taught"
    assert "for 7 trainings one after the other on cpu" in timed


def test_sizes_and_times_for_people() -> None:
    assert [estimate.told(n) for n in (0, 5 * 2**20, 3 * 2**30)] == ["0 MiB", "5 MiB", "3.0 GiB"]
    assert [estimate.length(s) for s in (3.14, 90, 600, 7200, 3 * 86_400)] == [
        "3.1 s",
        "90 s",
        "10.0 minutes",
        "2.0 hours",
        "3.0 days",
    ]
