"""AB, FT, FSP, OFD, ReviewKD and SemCKD: their phases, the pairs they refuse, and what golden vectors cannot show."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pupil.fit import activate, step, teacher_features
from pupil.methods import METHODS
from pupil.methods.base import Method, Setup
from pupil.methods.ft import FT
from pupil.methods.ofd import OFD, norms
from pupil.methods.reviewkd import ReviewKD
from pupil.methods.semckd import SemCKD
from pupil.models import NETWORKS, build
from pupil.net import probe
from pupil.optim import Optim, make_optimizer
from pupil.types import UserError
from tests import tiny
from tests.reference.golden import listings
from tests.reference.test_models import ours

NAMES = ("ab", "ft", "fsp", "ofd", "reviewkd", "semckd")


def pair(name: str, teacher: str, student: str, size: int = 32, **values: Any) -> Method:
    t, s = build(teacher, tiny.CLASSES).eval().requires_grad_(False), build(student, tiny.CLASSES)
    setup = Setup(s, t, probe(s, size), probe(t, size), tiny.loader().labels, batch_size=8)
    return METHODS[name](setup, METHODS[name].Config(**values))


def one_step(method: Method, number: int, samples: int = 8, lr: float = 0.01, size: int = 32) -> None:
    """A step of the phase of this number."""
    batch = next(iter(tiny.loader(None, batch_size=samples, size=size).epoch(1)))
    phase = method.phases()[number]
    activate(method, phase)
    optimizer, _ = make_optimizer(phase, Optim(lr=lr))
    step(method, teacher_features(method.teacher, batch), batch, phase, optimizer)
    for name, p in method.named_parameters():
        assert (p.grad is not None) == p.requires_grad, f"{phase.name}: {name}"


# --- pairs -------------------------------------------------------------------------------------------------------------


PAIRS = [(n, *p) for n in NAMES if n != "fsp" for p in (("resnet14x2", "wrn_16_1"), ("vgg8", "MobileNetV2"))]
PAIRS += [(name, "wrn_16_2", "vgg8") for name in ("ft", "ofd", "reviewkd", "semckd")]  # three maps and four


@pytest.mark.parametrize(("name", "teacher", "student"), PAIRS)
def test_pairs_of_other_widths_sizes_and_numbers_of_maps_train(name: str, teacher: str, student: str) -> None:
    method = pair(name, teacher, student)
    for number in range(len(method.phases())):
        one_step(method, number, lr=1e-4)
    assert all(value.isfinite().all() for value in method.state_dict().values())


def test_fsp_trains_a_wide_network_of_the_same_widths() -> None:
    method = pair("fsp", "wrn_16_1", "refilled_wrn_16_1")
    one_step(method, 0)
    one_step(method, 1)


@pytest.mark.parametrize(
    ("name", "teacher", "student", "values", "says"),
    [
        ("ab", "vgg8", "resnet8", {}, "equally many maps, got 3 and 4"),
        ("ab", "resnet8", "resnet8", {"init_epochs": 0}, "must be positive, got 0 and 1.0"),
        ("ab", "resnet8", "resnet8", {"ce": 0.0}, "nothing to train on after the first phase"),
        ("fsp", "wrn_16_2", "wrn_16_1", {}, r"got \[16, 16, 32, 64\] and \[16, 32, 64, 128\]"),
        ("fsp", "wrn_16_1", "wrn_16_1", {"beta": 0.0}, "must be positive, got 30 and 0.0"),
        ("fsp", "wrn_16_1", "wrn_16_1", {"ce": 0.0}, "nothing to train on after the first phase"),
        ("ft", "resnet8", "resnet8", {"k": 0.0}, "a share of the teacher's 64 channels"),
        ("ft", "resnet8", "resnet8", {"p1": 0}, "must be at least 1, got 0, 1 and 30"),
        ("ofd", "vgg8_plain", "vgg8", {}, "has none that can be told"),
        ("ofd", "ShuffleV2", "vgg8", {}, "has none that can be told"),
        ("ofd", "resnet8", "resnet8", {"kernel": 2}, "must be odd and positive, got 2"),
        ("ofd", "resnet8", "resnet8", {"teacher_mode": "frozen"}, "must be eval or train, got 'frozen'"),
        ("reviewkd", "resnet8", "resnet8", {"warm_up": 0}, "must be at least 1 epoch, got 0"),
        ("semckd", "resnet8", "resnet8", {"factor": 9}, "from 1 to the batch size of 8, got 9"),
        ("semckd", "resnet8", "resnet8", {"soft": 0.0}, "must be greater than 0, got 0.0"),
    ],
)
def test_impossible_settings_and_pairs_are_refused_in_one_line(
    name: str, teacher: str, student: str, values: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says) as e:
        pair(name, teacher, student, **values)
    assert "\n" not in str(e.value)


def test_semckd_refuses_a_training_set_that_fills_no_batch() -> None:
    setup = replace(tiny.setup(), batch_size=tiny.SAMPLES + 1)
    with pytest.raises(UserError, match=r"full batches of 21, and there are 20 training images; lower optim.batch_size"):
        SemCKD(setup, SemCKD.Config())


# --- phases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ab", "fsp"])
def test_first_phase_trains_what_makes_the_maps_and_leaves_the_rest_in_eval_mode(name: str) -> None:
    method = pair(name, "wrn_16_1", "wrn_16_1")
    before = tiny.state(method.student)
    one_step(method, 0)
    after = tiny.state(method.student)
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert same == {key for key in before if key.startswith(("head.", "stages.2.norm."))}
    assert method.student.stages[0].training
    assert not method.student.stages[2].norm.training  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["ab", "fsp", "ft"])
def test_first_phase_keeps_its_learning_rate(name: str) -> None:
    first, second = tiny.make(name, {"init_epochs": 7}).phases()
    assert (first.epochs, first.constant, second.constant) == (7, True, False)
    _, scheduler = make_optimizer(first, Optim(milestones=(1,)))
    for _ in range(3):
        scheduler.optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(0.05 if first.lr is None else first.lr)


def test_ft_trains_the_paraphraser_first_and_only_then() -> None:
    method = tiny.make("ft")
    assert isinstance(method, FT)
    student, paraphraser = tiny.state(method.student), tiny.state(method.paraphraser)
    one_step(method, 0, size=16)
    assert tiny.same(student, tiny.state(method.student))
    trained = tiny.state(method.paraphraser)
    assert not any(torch.equal(paraphraser[key], trained[key]) for key in trained)
    one_step(method, 1, size=16)
    assert tiny.same(trained, tiny.state(method.paraphraser))
    assert not tiny.same(student, tiny.state(method.student))
    assert [tiny.make("ft", {"init_lr": lr}).phases()[0].lr for lr in (0.0, 0.02)] == [None, 0.02]


# --- OFD ---------------------------------------------------------------------------------------------------------------


def test_ofd_finds_the_norms_that_mdistiller_names() -> None:
    checked = set()
    for row in listings(Path(__file__).parent / "golden/models.json"):
        name, named = ours(row["repo"], row["constructor"]), row.get("bn_before_relu")
        if name is None or name in checked or not isinstance(named, list) or "plain" in name or row["total_params"] > 25e6:
            continue
        net = build(name, row["num_classes"])
        rename = sys.modules[NETWORKS[name].__module__].published_key
        expected = [net.get_submodule(rename(f"{module}.weight").removesuffix(".weight")) for module in named]
        found = norms(Setup(net, net, probe(net, 32), probe(net, 32), torch.arange(2)))
        assert all(a is b for a, b in zip(found[-len(named) :], expected, strict=True)), name
        checked.add(name)
    assert {"resnet8", "wrn_16_1", "vgg8", "ResNet50", "MobileNetV2"} <= checked


def test_ofd_pairs_the_deepest_stages_and_their_margins() -> None:
    method = pair("ofd", "vgg8", "resnet8")
    assert [len(method.get_buffer(f"margin_{i}")) for i in range(3)] == [256, 512, 512]


def test_ofd_with_the_teacher_in_train_mode_uses_a_copy_whose_statistics_drift() -> None:
    method = tiny.make("ofd", {"teacher_mode": "train"})
    assert isinstance(method, OFD)
    assert method.twin is not None
    teacher, twin = tiny.state(method.teacher), tiny.state(method.twin.net)
    assert tiny.same(teacher, twin)
    one_step(method, 0, size=16)
    assert method.twin.net.stages[0].training
    assert not method.teacher.stages[0].training
    assert tiny.same(teacher, tiny.state(method.teacher))
    changed = {key for key, value in tiny.state(method.twin.net).items() if not torch.equal(value, twin[key])}
    assert changed
    assert all("running_" in key or "num_batches" in key for key in changed)


# --- ReviewKD, SemCKD --------------------------------------------------------------------------------------------------


def test_reviewkd_warms_up_over_the_epochs() -> None:
    method, batch = tiny.make("reviewkd", {"warm_up": 4}), tiny.first_batch()
    assert isinstance(method, ReviewKD)
    with torch.no_grad():
        s, t = method.student.features(batch.images), method.teacher.features(batch.images)
        losses = [method.knowledge(s, t, batch._replace(epoch=epoch)).item() for epoch in (1, 2, 4, 9)]
    assert [loss / losses[2] for loss in losses] == pytest.approx([0.25, 0.5, 1, 1])


@pytest.mark.parametrize("samples", [1, 5, 9])
def test_semckd_trains_labels_alone_in_a_batch_of_another_size(samples: int) -> None:
    method = tiny.make("semckd")
    assert isinstance(method, SemCKD)
    batch = next(iter(tiny.loader(None, batch_size=samples).epoch(1)))
    student, own = tiny.state(method.student), tiny.state(method.project)
    phase = method.phases()[0]
    activate(method, phase)
    terms = step(method, teacher_features(method.teacher, batch), batch, phase, make_optimizer(phase, Optim())[0])
    assert terms["knowledge"].raw.item() == 0
    assert terms["ce"].raw.item() > 0
    assert tiny.same(own, tiny.state(method.project)), "neither weights nor statistics"
    assert not tiny.same(student, tiny.state(method.student))
    assert method.observed() == {}


def test_semckd_shows_its_attention() -> None:
    method = tiny.make("semckd")
    one_step(method, 0, size=16)
    shown = method.observed()["attention"]
    assert shown.shape == (3, 3)
    assert not shown.requires_grad
    torch.testing.assert_close(shown.sum(1), torch.ones(3))
