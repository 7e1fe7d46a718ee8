"""What holds for every row of the table of methods: a new method is tested by being in it."""

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch

from pupil.fit import activate, step, teacher_features
from pupil.methods import METHODS
from pupil.methods.base import Method
from pupil.models import build
from pupil.net import FrozenLinear
from pupil.optim import Optim, make_optimizer
from pupil.types import Batch
from tests import tiny

every_method = pytest.mark.parametrize("name", METHODS)
every_variant = pytest.mark.parametrize(("name", "overrides"), tiny.VARIANTS, ids=tiny.label)
every_teacher = pytest.mark.parametrize("teacher", tiny.TEACHERS)


# --- on paper ----------------------------------------------------------------------------------------------------------


@every_method
def test_config_is_frozen_and_has_plain_defaults_only(name: str) -> None:
    config = METHODS[name].Config()
    for field in dataclasses.fields(config):
        assert isinstance(field.default, int | float | str | bool), f"{field.name}: {field.default!r}"
        assert isinstance(getattr(config, field.name), int | float | str | bool)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, field.default)


@every_method
def test_method_names_its_paper_and_says_what_it_does(name: str) -> None:
    cls = METHODS[name]
    assert cls.paper, "the paper: authors, venue, arXiv"
    assert cls.__module__ == f"pupil.methods.{name}", "one method per file, called like its row"
    doc = sys.modules[cls.__module__].__doc__ or ""
    for part in ("Paper:", "Loss:", "Trained:", "Deployed:", "Defaults"):
        assert part in doc, f"the module docstring lacks {part!r}"
    arxiv = cls.paper.rpartition("arXiv:")[2]
    assert arxiv in doc, "the docstring and `paper` name the same paper"


def test_every_method_appears_once() -> None:
    assert len(set(METHODS.values())) == len(METHODS)


# --- in training -------------------------------------------------------------------------------------------------------


@every_teacher
@every_variant
def test_every_trained_tensor_gets_a_finite_gradient_and_one_place_in_the_optimiser(
    name: str, overrides: dict[str, Any], teacher: str
) -> None:
    method = tiny.make(name, overrides, teacher)
    for phase in method.phases():
        if phase.before is not None:
            phase.before(tiny.loader().epoch(0))
        activate(method, phase)
        optimizer, _ = make_optimizer(phase, Optim(lr=0.0))
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        trained = {id(p): n for n, p in method.named_parameters() if p.requires_grad}
        assert sorted(held) == sorted(trained), "once each, and nothing else"
        batch = tiny.first_batch()
        step(method, teacher_features(method.teacher, batch), batch, phase, optimizer)
        for n, p in method.named_parameters():
            if id(p) in trained:
                assert p.grad is not None, f"{phase.name}: {n} is trained but gets no gradient"
                assert p.grad.isfinite().all(), f"{phase.name}: {n}"
            else:
                assert p.grad is None, f"{phase.name}: {n} is not trained but gets a gradient"


@every_teacher
@every_variant
def test_teacher_is_left_alone_by_training(name: str, overrides: dict[str, Any], teacher: str) -> None:
    method = tiny.make(name, overrides, teacher)
    before = tiny.state(method.teacher)
    own = {id(x) for x in (*method.parameters(), *method.buffers())}
    tiny.train(method, method.teacher)
    assert tiny.same(before, tiny.state(method.teacher)), "bit for bit"
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert not any(m.training for m in method.teacher.modules())
    assert own.isdisjoint(id(x) for x in (*method.teacher.parameters(), *method.teacher.buffers())), "it is no part"


@every_variant
def test_frozen_classifiers_do_not_change(name: str, overrides: dict[str, Any]) -> None:
    method = tiny.make(name, overrides)
    frozen = [m for m in method.modules() if isinstance(m, FrozenLinear)]
    before = [tiny.state(m) for m in frozen]
    tiny.train(method, method.teacher)
    assert all(tiny.same(a, tiny.state(m)) for a, m in zip(before, frozen, strict=True))


@every_variant
def test_loss_falls_when_one_batch_is_fitted_again_and_again(name: str, overrides: dict[str, Any]) -> None:
    method, batch = tiny.make(name, overrides), tiny.first_batch()
    torch.manual_seed(0)
    for phase in method.phases():
        if phase.before is not None:
            phase.before([batch])
        activate(method, phase)
        optimizer, _ = make_optimizer(phase, Optim(lr=0.01))
        t, losses = teacher_features(method.teacher, batch), []
        for _ in range(15):
            terms = step(method, t, batch, phase, optimizer)
            losses.append(sum(term.weight * term.raw.item() for term in terms.values()))
        assert sum(losses[-3:]) < 0.98 * sum(losses[:3]), f"{phase.name}: {losses}"


@every_variant
def test_deployed_student_is_rebuilt_from_plain_values(name: str, overrides: dict[str, Any]) -> None:
    method = tiny.make(name, overrides)
    trained = tiny.train(method, method.teacher, epochs=1)
    surgery = json.loads(json.dumps(method.surgery))
    assert surgery == method.surgery, "plain values: they go into the checkpoint"
    net = METHODS[name].deployed(build(tiny.STUDENT, tiny.CLASSES), **surgery)
    net.load_state_dict(trained.last, strict=True)
    images = tiny.first_batch().images
    assert torch.equal(net.eval()(images), method.student.eval()(images))
    assert net(images).shape == (len(images), tiny.CLASSES)


# --- fairness ----------------------------------------------------------------------------------------------------------


@every_variant
def test_every_method_starts_from_the_same_student(name: str, overrides: dict[str, Any]) -> None:
    plain = tiny.state(tiny.setup(seed=3).student)
    student = tiny.make(name, overrides, seed=3).student
    found = tiny.state(student)
    borrowed = isinstance(student.head, FrozenLinear) or overrides.get("head") == "init"
    kept = [key for key in plain if not (key.startswith("head.") and borrowed)]
    assert all(torch.equal(plain[key], found[key]) for key in kept)
    assert len(kept) >= len(plain) - 2


@every_variant
def test_every_method_sees_the_same_batches(name: str, overrides: dict[str, Any]) -> None:
    seen: list[Batch] = []

    def record(batches: Iterable[Batch], phase: str, epoch: int, epochs: int, first: int = 0) -> Iterator[Batch]:
        for batch in batches:
            seen.append(batch)
            yield batch

    method = tiny.make(name, overrides)
    tiny.train(method, method.teacher, watch=record)
    epochs = sum(phase.epochs or 2 for phase in method.phases())
    expected = [batch for number in range(1, epochs + 1) for batch in tiny.loader().epoch(number)]
    assert len(seen) == len(expected)
    for a, b in zip(seen, expected, strict=True):
        assert a.epoch == b.epoch
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


@every_variant
def test_same_seed_gives_the_same_weights_bit_for_bit(name: str, overrides: dict[str, Any]) -> None:
    def run(seed: int) -> dict[str, torch.Tensor]:
        method = tiny.make(name, overrides, seed=seed)
        return tiny.train(method, method.teacher, seed=seed).last

    first, again, other = run(0), run(0), run(1)
    assert tiny.same(first, again)
    assert not tiny.same(first, other)
    assert all(value.isfinite().all() for value in first.values())


@every_method
def test_last_small_batch_is_trained_on(name: str) -> None:
    method: Method = tiny.make(name)
    lengths: list[int] = []

    def record(batches: Iterable[Batch], phase: str, epoch: int, epochs: int, first: int = 0) -> Iterator[Batch]:
        for batch in batches:
            lengths.append(len(batch.labels))
            yield batch

    train = tiny.loader(samples=tiny.SAMPLES, batch_size=tiny.SAMPLES - 1)  # the last batch is one image
    optim = Optim(epochs=1, lr=0.01, milestones=())
    trained = tiny.fit(method, method.teacher, train, tiny.loader(None), optim, tiny.quiet, record)
    assert lengths[-1] == 1
    assert all(math.isfinite(value.sum().item()) for value in trained.last.values())
