"""REFILLED: its formulas written out in float64, what its first phase leaves, its centres, and teachers of other classes."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pupil import assemble, checkpoint, config, record, session, tracking
from pupil import settings as settings_of
from pupil.data import Data, prepare
from pupil.data.classes import refilled_classes
from pupil.fit import activate, step, teacher_features
from pupil.methods import METHODS, refilled
from pupil.methods.refilled import REFILLED, distances, ncm, semi_hard
from pupil.methods.simkd import SimKD
from pupil.models import build
from pupil.optim import Optim, make_optimizer
from pupil.standalone import export
from pupil.types import Batch, UserError
from tests import tiny
from tests.reference.blocks import batch_of, said, setup_of, total
from tests.test_relations import g

B, K = 13, 5
LABELS = torch.tensor([0, 0, 1, 2, 1, 2, 3, 3, 0, 1, 2, 3, 3])  # of class 4 there is none


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(e_s: Tensor, e_t: Tensor, z_s: Tensor | None = None, **values: Any) -> tuple[REFILLED, Any, Any]:
    s, t = said(e_s, z_s), said(e_t)
    return REFILLED(setup_of(s, t, samples=4), REFILLED.Config(**values)), s, t


def gaps(e: np.ndarray) -> np.ndarray:
    e = e / np.sqrt((e**2).sum(1, keepdims=True))
    return np.array([[np.sqrt(((a - b) ** 2).sum()) for b in e] for a in e])


def triplets(d: np.ndarray, labels: list[int], margin: float) -> list[tuple[int, int, int]]:
    return [
        (a, p, n)
        for a, p, n in itertools.product(range(len(labels)), repeat=3)
        if a != p and labels[a] == labels[p] != labels[n] and 0 < d[a, n] - d[a, p] <= margin
    ]


def softmax(z: list[float]) -> np.ndarray:
    e = np.exp(np.array(z) - max(z))
    return e / e.sum()


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum())


# --- the first phase ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("mode", ["triplet", "tuple"])
def test_first_phase_is_the_formula(mode: str, margin: float) -> None:
    e_s, e_t = normal(0, B, 7), 3 * normal(1, B, 11)
    method, s, t = made(e_s, e_t, mode=mode, margin=margin, tau=0.7, init_beta=30.0)
    terms = method.compare(s, t, batch_of(e_s, LABELS))
    d_s, d_t = (gaps(e.double().numpy()) for e in (e_s, e_t))
    found = triplets(d_s, LABELS.tolist(), margin)
    assert len(found) > 3
    if mode == "triplet":
        chances = [[1 / (1 + np.exp(-(d[a, n] - d[a, p]) / 0.7)) for d in (d_t, d_s)] for a, p, n in found]
        parts = [divergence(np.array([t_, 1 - t_]), np.array([s_, 1 - s_])) for t_, s_ in chances]
        expected = sum(parts) / (2 * len(found))
    else:
        groups = {(a, p): [n for a_, p_, n in found if (a_, p_) == (a, p)] for a, p, _ in found}
        rows = [[softmax([-d[a, k] / 0.7 for k in (p, *ns)]) for d in (d_t, d_s)] for (a, p), ns in groups.items()]
        expected = sum(divergence(*pair) for pair in rows) / len(groups)
    assert terms["relations"].weight == 30.0
    assert terms["relations"].raw.item() == pytest.approx(expected, rel=1e-4)
    possible = sum(LABELS[a] == LABELS[p] != LABELS[n] for a, p, n in itertools.product(range(B), repeat=3) if a != p)
    assert method.observed()["semi_hard_share"].item() == pytest.approx(len(found) / int(possible))


@pytest.mark.parametrize(("mode", "loss", "slope"), [("triplet", 0.14250307, 0.1735695), ("tuple", 0.32063076, 0.2972632)])
def test_first_phase_gives_the_numbers_of_the_specification(mode: str, loss: float, slope: float) -> None:
    e_s, labels = g((12, 16), 26).requires_grad_(), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 0, 1, 2, 3])
    method, s, t = made(e_s, g((12, 24), 27), mode=mode)
    found = total(method.compare(s, t, batch_of(e_s, labels)))
    found.backward()
    assert method.observed()["semi_hard_share"].item() == pytest.approx(87 / (12 * 2 * 9)), "87 triplets"
    assert found.item() == pytest.approx(loss, rel=1e-4)
    assert e_s.grad is not None
    assert e_s.grad.norm().item() == pytest.approx(slope, rel=1e-4)


def test_mining_finds_the_triplets_of_three_nested_loops_in_their_order() -> None:
    for seed in range(5):
        e = normal(seed, B, 4)
        pairs, mined = semi_hard(distances(e), LABELS, 0.4)
        at, n = mined.nonzero().unbind(1)
        found = torch.cat([pairs[at], n[:, None]], 1).tolist()
        assert found == [list(x) for x in triplets(gaps(e.double().numpy()), LABELS.tolist(), 0.4)]


@pytest.mark.parametrize("mode", ["triplet", "tuple"])
@pytest.mark.parametrize(
    ("e", "labels"),
    [
        (torch.ones(6, 3), [0, 0, 1, 1, 2, 2]),  # all distances are 0
        (torch.zeros(6, 3), [0, 0, 1, 1, 2, 2]),  # and no direction
        (normal(0, 6, 3), [0, 1, 2, 3, 4, 5]),  # no positives
        (normal(0, 6, 3), [1, 1, 1, 1, 1, 1]),  # no negatives
        (normal(0, 1, 3), [0]),
    ],
)
def test_a_batch_without_triplets_gives_zero_and_no_gradient(mode: str, e: Tensor, labels: list[int]) -> None:
    e_s = e.clone().requires_grad_()
    method, s, t = made(e_s, normal(1, len(e), 5), mode=mode)
    loss = total(method.compare(s, t, batch_of(e_s, torch.tensor(labels))))
    loss.backward()
    assert loss.item() == 0
    assert e_s.grad is not None
    assert e_s.grad.abs().max() == 0


@pytest.mark.parametrize("mode", ["triplet", "tuple"])
def test_first_phase_is_finite_where_some_images_are_the_same(mode: str) -> None:
    e_s = normal(0, B, 7)
    e_s[1] = e_s[0]
    e_s[3] = 100 * e_s[2]
    leaf = e_s.requires_grad_()
    method, s, t = made(leaf, normal(1, B, 4), mode=mode)
    loss = total(method.compare(s, t, batch_of(leaf, LABELS)))
    loss.backward()
    assert loss.item() > 0
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


def test_accuracy_by_class_means_is_the_formula() -> None:
    e = normal(3, 40, 6) + 0.7 * F.one_hot(torch.arange(40) % K, 6)
    labels = torch.arange(40) % K
    x, y = e.double().numpy(), labels.numpy()
    means = [x[y == c].mean(0) for c in range(K)]
    centres = np.array([m / np.linalg.norm(m) for m in means])
    right = [int(np.argmax([v @ c for c in centres]) == label) for v, label in zip(x, y, strict=True)]
    assert 0 < sum(right) < 40
    assert ncm(e, labels) == pytest.approx(100 * sum(right) / 40)


def test_first_phase_leaves_the_student_of_its_best_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    said_of = iter([20.0, 70.0, 70.0, 30.0])
    monkeypatch.setattr(refilled, "ncm", lambda e, labels: next(said_of))
    method = tiny.make("refilled", {"init_epochs": 4, "init_lr": 0.1})
    after: dict[int, dict[str, Tensor]] = {}
    lines: list[dict[str, float]] = []
    found: list[dict[str, Tensor]] = []

    def log(values: Mapping[str, float], epoch: int) -> None:
        after[epoch] = tiny.state(method.student)
        lines.append(dict(values))

    def look(self: REFILLED, batches: Iterable[Batch]) -> None:
        found.append(tiny.state(self.student))

    monkeypatch.setattr(REFILLED, "look", look)
    start = tiny.state(method.student.head)
    trained = tiny.train(method, method.teacher, log=log, optim=Optim(epochs=2, lr=0.01, milestones=()))
    assert tiny.same(found[0], after[3]), "of equals the later"
    assert not tiny.same(found[0], after[4])
    assert all(torch.equal(after[4][f"head.{key}"], value) for key, value in start.items())
    assert trained.best_epoch in (5, 6), "an epoch of the second phase"
    lr = [0.01 + 0.09 * (1 + np.cos(np.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert [line["lr"] for line in lines] == pytest.approx([*lr, 0.01, 0.01])
    assert ["val/ncm_top1" in line for line in lines] == 4 * [True] + 2 * [False]


# --- the second phase -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centres", ["global", "local"])
def test_second_phase_is_the_formula(centres: str) -> None:
    e_t, z = normal(1, B, 6), 2 * normal(2, B, K)
    method, s, t = made(normal(0, B, 7), e_t, z, centres=centres, T=1.5, beta=20.0, ce=0.5)
    everything, labels = normal(5, 30, 6), torch.arange(30) % K
    method.centres = F.normalize(torch.stack([everything[labels == c].mean(0) for c in range(K)]))
    terms = method.loss(s, t, batch_of(z, LABELS))
    x, y, z_ = e_t.double().numpy(), LABELS.tolist(), z.double().numpy()
    base, of = (x, np.array(y)) if centres == "local" else (everything.double().numpy(), labels.numpy())
    means = {c: base[of == c].mean(0) for c in set(y)}
    parts = []
    for i in range(B):
        theirs = softmax([x[i] @ (m / np.linalg.norm(m)) / 1.5 for m in means.values()])
        parts.append(divergence(theirs, softmax([z_[i, c] / 1.5 for c in means])))
    assert terms["knowledge"].raw.item() == pytest.approx(sum(parts) / B, rel=1e-5)
    assert terms["ce"].raw.item() == pytest.approx(-np.mean([np.log(softmax(z_[i])[y[i]]) for i in range(B)]), rel=1e-5)
    assert (terms["knowledge"].weight, terms["ce"].weight) == (20.0, 0.5)


def test_second_phase_gives_the_numbers_of_the_specification() -> None:
    z, labels = (4 * g((6, 10), 6).double()).float().requires_grad_(), torch.tensor([0, 3, 3, 7, 9, 0])
    method, s, t = made(normal(0, 6, 7), g((6, 24), 4), z)
    method.centres = F.normalize(g((10, 24), 28))
    term = method.loss(s, t, batch_of(z, labels))["knowledge"]
    loss = term.weight * term.raw
    loss.backward()
    assert loss.item() == pytest.approx(78.895218, rel=1e-4)
    assert z.grad is not None
    assert z.grad.norm().item() == pytest.approx(11.74718, rel=1e-4)


def test_global_centres_are_the_means_over_the_training_set_as_augmented() -> None:
    method = tiny.make("refilled")
    batches = list(tiny.loader().epoch(0))
    method.phases()[1].before(batches)  # type: ignore[misc]
    images, labels = torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])
    assert len(labels) == tiny.SAMPLES
    with torch.no_grad():
        e = method.teacher.features(images).embedding.double()
    means = torch.stack([e[labels == c].mean(0) for c in range(tiny.CLASSES)])
    expected = means / means.norm(dim=1, keepdim=True)
    torch.testing.assert_close(method.centres.double(), expected, rtol=0, atol=1e-5)
    shown = method.observed()["cosines_of_class_centres"].double()
    torch.testing.assert_close(shown, expected @ expected.T, rtol=0, atol=1e-5)


# --- teachers of other classes, few images ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["triplet", "tuple"])
def test_a_stage_distils_across_tasks_with_few_images_of_each_class(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digits: teachers know 0 to 4, students 0, 1, 7, 8 and 9, six training images of each; a teacher of other width."""
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    data = Data(image_size=16, overlap=0.4, per_class=6, val_images=20, test_images=40)
    sets = refilled_classes(0.4, 10)
    assert (sets.teacher, sets.student) == ([0, 1, 2, 3, 4], [0, 1, 7, 8, 9])
    prepare(data, tmp_path / "data")
    page = {"prepared": str(tmp_path / "data"), "teachers": ["wrn_16_2"], "data": settings_of.plain(data), "device": "cpu"}
    page |= {"optim": {"epochs": 2, "batch_size": 15, "lr": 0.02, "nesterov": True}}
    page |= {"hp": {"refilled": {"mode": mode, "init_epochs": 2, "init_lr": 0.02}}}
    found = config.resolve(settings_of.overlay(settings_of.defaults(), page))
    theirs = replace(found, train=settings_of.Train(role="teacher"))
    own = assemble.prepared(theirs)
    job = assemble.single(theirs, own)
    meta = {**job.meta, **{key: own.manifest[key] for key in ("classes", "image_size", "mean", "std")}}
    checkpoint.save(tmp_path / "teacher", job.method.student.state_dict(), meta)
    mine = replace(
        found, distill=settings_of.Distill(checkpoint=str(tmp_path / "teacher"), student="resnet8", method="refilled")
    )
    mine = replace(mine, out=str(tmp_path / "model"), record=str(tmp_path / "record"))
    ours = assemble.prepared(mine)
    assert ours.splits["train"][1].bincount().tolist() == 5 * [6]
    assert own.splits["train"][1].bincount().tolist() == 5 * [6]
    session.run([[assemble.distillation(mine, ours)]], ours, mine)
    net, taught = checkpoint.load(tmp_path / "model")
    assert taught["classes"] == ["0", "1", "7", "8", "9"]
    assert checkpoint.load(tmp_path / "teacher")[1]["classes"] == ["0", "1", "2", "3", "4"]
    assert net(torch.zeros(2, 3, 16, 16)).shape == (2, 5)
    lines = [line["values"] for line in record.read_metrics(tmp_path / "record")]
    assert len(lines) == 4
    assert all(line["embed/semi_hard_share"] > 0 for line in lines[:2])
    assert all(line["distil/knowledge"] > 0 for line in lines[2:])
    assert (tmp_path / "record" / "artifacts" / "cosines_of_class_centres.png").exists()


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"mode": "pairs"}, "hp.refilled.mode must be triplet or tuple, got 'pairs'"),
        ({"centres": "none"}, "hp.refilled.centres must be global or local, got 'none'"),
        ({"margin": 0.0}, "margin, tau, init_beta and init_epochs must be positive"),
        ({"init_epochs": 0}, "margin, tau, init_beta and init_epochs must be positive"),
        ({"init_lr": -0.1}, "init_lr positive or 0 for the optimiser's"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(values: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny.make("refilled", values)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "batch_size"),
    [([0, 1, 2, 3], 8), ([2, 2, 2, 2], 8), ([0, 0, 1, 1], 2)],
    ids=["one each", "one class", "batch of 2"],
)
def test_images_that_cannot_make_a_triplet_are_refused(labels: list[int], batch_size: int) -> None:
    around = replace(tiny.setup(), labels=torch.tensor(labels), batch_size=batch_size)
    with pytest.raises(UserError, match=r"compares two images of a class with one of another.*; use more images"):
        REFILLED(around, REFILLED.Config())


# --- another method after the first phase -----------------------------------------------------------------------------------


def test_simkd_after_the_first_phase_is_simkd_of_the_student_that_it_leaves() -> None:
    method = tiny.make("refilled", {"then": "simkd"})
    embed, distil = method.phases()
    assert (embed.name, embed.epochs, distil.name) == ("embed", 1, "distil")
    inner = method.inner
    assert isinstance(inner, SimKD)
    assert method.student is inner.student
    projector = [f"neck.{key}" for key in tiny.state(method.student.neck) if key.endswith("weight")]
    lines: list[dict[str, float]] = []
    after: list[dict[str, Tensor]] = [tiny.state(method.student)]

    def log(values: Mapping[str, float], epoch: int) -> None:
        lines.append(dict(values))
        after.append(tiny.state(method.student))

    head = tiny.state(method.student.head)
    trained = tiny.train(method, method.teacher, log=log)
    for before, then in itertools.pairwise(after):
        assert not any(torch.equal(before[key], then[key]) for key in projector), "the projector learns in both phases"
    assert tiny.same(head, tiny.state(method.student.head)), "the teacher's"
    assert ["embed/semi_hard_share" in line for line in lines] == [True, False, False]
    assert all("distil/semi_hard_share" not in line for line in lines)
    assert [line["distil/knowledge"] for line in lines[1:]] == [line["distil/loss"] for line in lines[1:]]
    batch = tiny.first_batch()
    with torch.no_grad():
        s, t = (net.features(batch.images) for net in (method.student, method.teacher))
    expected = (s.last.double() - t.last.double()).square().mean()
    assert distil.loss(s, t, batch)["knowledge"].raw.item() == pytest.approx(expected.item(), rel=1e-5)
    rebuilt = REFILLED.deployed(build(tiny.STUDENT, tiny.CLASSES), **method.surgery)
    rebuilt.load_state_dict(trained.last)
    assert torch.equal(rebuilt.eval()(batch.images), method.student.eval()(batch.images))


@pytest.mark.parametrize("then", [name for name in METHODS if name not in ("refilled", "simkd")])
def test_every_other_method_can_follow_the_first_phase_with_phases_of_its_own(then: str) -> None:
    method, alone = tiny.make("refilled", {"then": then}), METHODS[then](tiny.setup(), METHODS[then].Config())
    assert [phase.name for phase in method.phases()] == ["embed", *(phase.name for phase in alone.phases())]
    assert method.two_views == alone.two_views
    assert sorted(n.removeprefix("inner.") for n, _ in method.named_parameters()) == sorted(
        n for n, _ in alone.named_parameters()
    )
    batch = tiny.first_batch()
    t = teacher_features(method.teacher, batch)
    for phase in method.phases():
        if phase.before is not None:
            phase.before([batch])
        activate(method, phase)
        optimizer, _ = make_optimizer(phase, Optim(lr=0.01))
        terms = step(method, t, batch, phase, optimizer)
        assert all(term.raw.isfinite() for term in terms.values())
    assert "semi_hard_share" not in method.observed()


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"then": "simkt"}, "hp.refilled.then: there is no method 'simkt'; known: kd, "),
        ({"then": "kd", "then_preset": "x"}, "hp.refilled.then_preset: kd has no preset 'x'; known: default, "),
        ({"then": "simkd", "beta": 2.0}, "hp.refilled.beta=2.0 has no effect with hp.refilled.then=simkd"),
        ({"then": "simkd", "centres": "local"}, "hp.refilled.centres=local has no effect with hp.refilled.then=simkd"),
        ({"then": "kd", "head": "init"}, "hp.refilled.head=init has no effect with hp.refilled.then=kd"),
    ],
)
def test_a_second_method_that_cannot_be_is_refused_in_one_line(values: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny.make("refilled", values)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_follows_decides_whether_the_teacher_may_have_other_classes() -> None:
    assert assemble.crosses_tasks("refilled", REFILLED.Config())
    assert assemble.crosses_tasks("refilled", REFILLED.Config(then="fitnet"))
    for config_ in (REFILLED.Config(then="simkd"), REFILLED.Config(then="cskd"), REFILLED.Config(then="kd")):
        assert not assemble.crosses_tasks("refilled", config_)
        with pytest.raises(UserError, match=rf"refilled with hp.refilled.then={config_.then} needs a teacher of the student's"):
            assemble.refuse_other_classes("refilled", config_)


def test_simkd_after_the_first_phase_is_kept_loaded_and_exported(tmp_path: Path) -> None:
    method = tiny.make("refilled", {"then": "simkd"})
    tiny.train(method, method.teacher, 1)
    facts = {"classes": list("abcd"), "image_size": tiny.SIZE, "mean": [0.5] * 3, "std": [0.25] * 3, "selection": "last"}
    meta = {"network": tiny.STUDENT, "role": "distilled", "method": "refilled", "surgery": method.surgery, "teacher": None}
    checkpoint.save(tmp_path / "model", method.student.state_dict(), {**meta, **facts, "epoch": 2})
    images = tiny.first_batch().images
    loaded, _ = checkpoint.load(tmp_path / "model")
    assert torch.equal(loaded(images), method.student.eval()(images))
    export(tmp_path / "model", tmp_path / "out")  # which proves that another Python answers the same
    assert (tmp_path / "out").exists()
