"""Logit standardisation, the learned temperature and MLKD, against the formulas written out in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pupil.data.strong import OPERATIONS, cut_out, draw, strengthen
from pupil.methods import METHODS
from pupil.methods.base import Method
from pupil.methods.ctkd import CTKD, reversal
from pupil.methods.ls import LS
from pupil.methods.mlkd import FURTHER, gram_gap
from pupil.optim import Optim
from pupil.types import Batch, Features, UserError
from tests import tiny
from tests.test_logit_formulas import LS as LS_
from tests.test_logit_formulas import LT

B, K = 6, tiny.CLASSES


def logits(seed: int, rows: int = B) -> Tensor:
    return 3 * torch.randn(rows, K, generator=torch.Generator().manual_seed(seed))


def said(z: Tensor) -> Features:
    empty = torch.zeros(len(z), 1, 1, 1)
    return Features(empty, (), (), empty, empty.flatten(1), z)


def batch(epoch: int = 1, rows: int = B) -> Batch:
    return Batch(torch.zeros(rows, 3, 4, 4), torch.arange(rows) % K, torch.arange(rows), epoch)


def total(method: Method, z_s: Tensor, z_t: Tensor, epoch: int = 1) -> Tensor:
    terms = method.loss(said(z_s), said(z_t), batch(epoch))
    return torch.stack([term.weight * term.raw for term in terms.values()]).sum()


def softmax(z: np.ndarray, T: float = 1.0) -> np.ndarray:
    e = np.exp((z - z.max(1, keepdims=True)) / T)
    return e / e.sum(1, keepdims=True)


def kl(z_s: np.ndarray, z_t: np.ndarray, T: float) -> float:
    p, q = softmax(z_t, T), softmax(z_s, T)
    return T * T * float((p * np.log(p / q)).sum()) / len(p)


def ce(z: np.ndarray, labels: np.ndarray) -> float:
    return -float(np.log(softmax(z)[np.arange(len(z)), labels]).mean())


def level(z: np.ndarray) -> np.ndarray:
    return (z - z.mean(1, keepdims=True)) / (z.std(1, ddof=1, keepdims=True) + 1e-7)


# --- LS ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["default", "resnet110-resnet20"])
def test_standardised_kd_is_the_formula(preset: str) -> None:
    z_s, z_t = logits(0), logits(1)
    values = LS.presets.get(preset, {"T": 2, "beta": 9})
    loss = total(tiny.make("ls", values), z_s, z_t)
    a, b = z_s.double().numpy(), z_t.double().numpy()
    expected = 0.1 * ce(a, batch().labels.numpy()) + values["beta"] * kl(level(a), level(b), values["T"])
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_standardised_dkd_is_dkd_of_standardised_logits_and_its_weights_are_multiplied() -> None:
    z_s, z_t = logits(0), logits(1)
    preset = LS.presets["dkd-vgg13-vgg8"]
    found = tiny.make("ls", {"of": "dkd", **preset}).loss(said(z_s), said(z_t), batch(epoch=5))
    dkd = tiny.make("dkd", {"beta": 2.0, "T": 2.0})
    a, b = (torch.from_numpy(level(z.double().numpy())).float() for z in (z_s, z_t))
    expected = dkd.loss(said(a), said(b), batch(epoch=5))
    assert found.keys() == expected.keys() == {"ce", "tckd", "nckd"}
    for name in ("tckd", "nckd"):
        assert found[name].raw.item() == pytest.approx(expected[name].raw.item(), rel=1e-4)
        assert found[name].weight == pytest.approx(15 * expected[name].weight)
    assert found["ce"].raw.item() == pytest.approx(ce(z_s.double().numpy(), batch().labels.numpy()), rel=1e-5)


def test_scale_and_offset_of_the_teachers_logits_do_not_matter() -> None:
    method, z_s, z_t = tiny.make("ls"), logits(0), logits(1)
    assert total(method, z_s, 7 * z_t + 3).item() == pytest.approx(total(method, z_s, z_t).item(), rel=1e-5)


def test_equal_logits_of_all_classes_give_a_finite_gradient() -> None:
    z = torch.zeros(B, K, requires_grad=True)
    total(tiny.make("ls"), z, logits(1)).backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


# --- CTKD --------------------------------------------------------------------------------------------------------------


def test_the_loss_is_kd_at_the_learned_temperature() -> None:
    z_s, z_t = logits(0), logits(1)
    T = 1 + 20 / (1 + np.exp(-1.0))
    assert abs(T - 15.62) < 0.005
    a, b = z_s.double().numpy(), z_t.double().numpy()
    expected = 0.1 * ce(a, batch().labels.numpy()) + 0.9 * kl(a, b, T)
    assert total(tiny.make("ctkd"), z_s, z_t).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("epoch", [1, 4, 10, 50])
def test_the_temperature_climbs_the_loss_by_a_gradient_that_grows(epoch: int) -> None:
    method = tiny.make("ctkd")
    assert isinstance(method, CTKD)
    total(method, logits(0), logits(1), epoch).backward()
    g, h = method.g.item(), 1e-4
    at = [1 + 20 / (1 + np.exp(-(g + d))) for d in (-h, h)]
    a, b = logits(0).double().numpy(), logits(1).double().numpy()
    slope = 0.9 * (kl(a, b, at[1]) - kl(a, b, at[0])) / (2 * h)
    pull = (1 + np.cos(np.pi * min(epoch, 10) / 10)) / 2 - 1
    assert reversal(epoch, 10) == pytest.approx(pull)
    assert -1 <= pull < 0
    assert method.g.grad is not None
    assert method.g.grad.item() == pytest.approx(pull * slope, rel=1e-3)


def test_the_temperature_is_trained_and_seen() -> None:
    method = tiny.make("ctkd")
    before = method.observed()["temperature"].item()
    seen: list[dict[str, float]] = []
    tiny.fit(
        method,
        method.teacher,
        tiny.loader(),
        tiny.loader(None),
        Optim(epochs=2, lr=0.1, milestones=()),
        lambda values, epoch: seen.append(dict(values)),
        tiny.silently,
    )
    found = [values["distil/temperature"] for values in seen]
    assert before == pytest.approx(15.62, abs=0.005)
    assert len({before, *found}) == 3, "it moves in each epoch"


@pytest.mark.parametrize("of", ["pkt", "dkd", "ls", "mlkd", "vid"])
def test_the_temperature_can_be_learned_for_other_methods(of: str) -> None:
    method = tiny.make("ctkd", {"of": of})
    trained = tiny.train(method, method.teacher)
    assert all(value.isfinite().all() for value in trained.last.values())
    assert method.get_parameter("g").item() != 1


# --- numbers that the authors' code gave ----------------------------------------------------------------------------------


def test_losses_and_gradients_are_the_authors() -> None:
    z_s = LS_.clone().requires_grad_()
    method = tiny.make("ls", {"beta": 1.0})
    loss = method.loss(said(z_s), said(LT), batch(rows=6))["kl"].raw
    loss.backward()
    assert loss.item() == pytest.approx(0.85059232, rel=1e-5)
    assert z_s.grad is not None
    assert z_s.grad.norm().item() == pytest.approx(0.03650739, rel=1e-5)
    z_s = LS_.clone().requires_grad_()
    method = tiny.make("ctkd")
    loss = method.loss(said(z_s), said(LT), batch(epoch=5))["kl"].raw  # lambda is -0.5
    loss.backward()
    assert loss.item() == pytest.approx(8.0833817, rel=1e-5)
    assert z_s.grad is not None
    assert z_s.grad.norm().item() == pytest.approx(0.5176092, rel=1e-5)
    slope = method.get_parameter("g").grad
    assert slope is not None
    assert slope.item() == pytest.approx(-0.0216366869, rel=1e-4), "in float64"
    assert slope.item() == pytest.approx(-0.02163278, rel=2e-4), "theirs, in float32, is 1.8e-4 from that"


@pytest.mark.parametrize(("by_class", "gap", "slope"), [(True, 0.02110338, 0.003082032), (False, 0.003138135, 0.0005909997)])
def test_class_and_batch_terms_are_the_authors(by_class: bool, gap: float, slope: float) -> None:
    z_s = LS_.clone().requires_grad_()
    p_s, p_t = ((z / 4).softmax(1) for z in (z_s, LT))
    found = gram_gap(p_s.T, p_t.T) if by_class else gram_gap(p_s, p_t)
    found.backward()
    assert found.item() == pytest.approx(gap, rel=1e-4)
    assert z_s.grad is not None
    assert z_s.grad.norm().item() == pytest.approx(slope, rel=1e-4)


# --- what cannot be wrapped --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("ls", {"of": "at"}, "ls wraps a method on logits"),
        ("ls", {"of": "mlkd"}, "hp.mlkd.preset=ls"),
        ("ls", {"of": "ls"}, "ls cannot wrap ls"),
        ("ls", {"of": "ctkd"}, "hp.ctkd.of=ls"),
        ("ls", {"of": "kdd"}, "there is no method 'kdd'"),
        ("ls", {"of_beta": 2.0}, "hp.ls.of=dkd, got of=kd"),
        ("ls", {"kl": 1.0}, "hp.ls.kl must be 0, got 1.0"),
        ("ctkd", {"of": "simkd"}, "deploys more than the student"),
        ("ctkd", {"of": "ft"}, "trains in several phases"),
        ("ctkd", {"of_preset": "x"}, "kd has no preset 'x'"),
        ("ctkd", {"ramp": 0}, "ramp must be greater than 0"),
        ("mlkd", {"kl": 1.0}, "hp.mlkd.kl must be 0"),
    ],
)
def test_what_is_impossible_is_one_line(name: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as e:
        tiny.make(name, values)
    assert said in str(e.value)
    assert "\n" not in str(e.value)


# --- MLKD --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("standardise", [False, True])
def test_mlkd_is_the_formula(standardise: bool) -> None:
    method = tiny.make("mlkd", METHODS["mlkd"].presets["ls"] if standardise else {})
    z_s, z_t = logits(0, 2 * B), logits(1, 2 * B)
    (weak_s, strong_s), (weak_t, strong_t) = (np.split(z.double().numpy(), 2) for z in (z_s, z_t))
    same = level if standardise else lambda z: z
    labels, T0 = batch().labels.numpy(), method.hp.T
    top, by_class = softmax(weak_t).max(1), softmax(weak_t).sum(0)
    m, c = (top <= np.percentile(top, 50)).mean(), (by_class <= np.percentile(by_class, 50)).mean()
    instance = per_class = per_batch = 0.0
    for T in (T0, 3, 5, 2, 6):
        instance += m * kl(same(weak_s), same(weak_t), T)
        p_s, p_t = softmax(weak_s, T), softmax(weak_t, T)
        per_class += c * np.square(p_t.T @ p_t - p_s.T @ p_s).sum() / K
        per_batch += m * np.square(p_t @ p_t.T - p_s @ p_s.T).sum() / B
    for T in (T0, 3, 5):
        instance += kl(same(strong_s), same(strong_t), T)
    for T in (2, 6):
        instance += kl(same(weak_s), same(weak_t), T)
    terms = method.loss(said(z_s), said(z_t), batch())
    expected = {"ce": ce(weak_s, labels) + ce(strong_s, labels), "instance": instance, "class": per_class, "batch": per_batch}
    assert {name: term.raw.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-4)
    assert {term.weight for name, term in terms.items() if name != "ce"} == {method.hp.beta}
    assert FURTHER == (3, 5, 2, 6)


def test_mlkd_trains_on_both_views_and_the_teacher_sees_both() -> None:
    method, b = tiny.make("mlkd"), tiny.first_batch()
    t = method.teacher.features(b.images)
    given: list[tuple[Features, Features]] = []
    method.eval()(b, t, lambda s, t, batch: given.append((s, t)) or {})
    (s, t2) = given[0]
    assert b.strong is not None
    torch.testing.assert_close(s.logits, torch.cat([method.student(b.images), method.student(b.strong)]))
    torch.testing.assert_close(t2.logits, torch.cat([method.teacher(b.images), method.teacher(b.strong)]))


# --- the strong view ---------------------------------------------------------------------------------------------------


def test_the_second_view_leaves_the_first_and_the_order_alone() -> None:
    two = tiny.loader()
    one = tiny.loader()
    one.two_views = False
    for a, b in zip(two.epoch(3), one.epoch(3), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.ids, b.ids)
        assert b.strong is None
        assert a.strong is not None
        assert not torch.equal(a.strong, a.images)


def test_the_second_view_depends_on_seed_epoch_and_sample_alone() -> None:
    def views(loader: Any, epoch: int) -> dict[int, Tensor]:
        return {int(i): x for b in loader.epoch(epoch) for i, x in zip(b.ids, b.strong, strict=True)}

    first, other_batches = views(tiny.loader(), 2), views(tiny.loader(batch_size=5), 2)
    assert all(torch.equal(first[i], other_batches[i]) for i in first)
    assert any(not torch.equal(first[i], x) for i, x in views(tiny.loader(), 3).items())
    assert any(not torch.equal(first[i], x) for i, x in views(tiny.loader(seed=1), 2).items())


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_keeps_an_image_an_image_at_both_ends_of_its_range(name: str) -> None:
    least, greatest, apply = OPERATIONS[name]
    image = torch.randint(50, 150, (3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for v in (least, (least + greatest) / 2, greatest):
        out = apply(image.clone(), v)
        assert out.shape == image.shape
        assert out.dtype == torch.uint8
    assert torch.equal(apply(image.clone(), least), image) == (name == "identity")


def test_translation_is_in_pixels_and_solarize_turns_bright_pixels_round() -> None:
    image = torch.zeros(3, 10, 10, dtype=torch.uint8)
    image[:, 5, 5] = 200
    moved = OPERATIONS["translate_x"][2](image, 0.3)
    assert moved[0].nonzero().tolist() == [[5, 8]]
    moved = OPERATIONS["translate_y"][2](image, -0.2)
    assert moved[0].nonzero().tolist() == [[3, 5]]
    assert OPERATIONS["solarize"][2](image, 100)[0, 5, 5] == 55
    assert OPERATIONS["solarize"][2](image, 201)[0, 5, 5] == 200


def test_the_hole_is_grey_within_the_border_and_up_to_half_as_wide() -> None:
    image = torch.full((3, 20, 20), 7, dtype=torch.uint8)
    hole = cut_out(image, 0.999, 0.5, 0.5)
    side = int((hole[0] != 7).sum() ** 0.5)
    assert 10 <= side <= 11
    assert hole[:, 10, 10].tolist() == [125, 123, 114]
    corner = cut_out(image, 0.5, 0.0, 0.0)
    assert corner[0, 0, 0] == 125
    assert (image == 7).all(), "the image given is left alone"


def test_all_operations_are_drawn_and_rows_are_independent() -> None:
    draws = draw(0, 1, torch.arange(400))
    assert set(draws.operations.flatten().tolist()) == set(range(14))
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    some = type(draws)(*(d[:4] for d in draws))
    together = strengthen(images, some)
    alone = torch.cat([strengthen(images[i : i + 1], type(draws)(*(d[i : i + 1] for d in draws))) for i in range(4)])
    assert torch.equal(together, alone)
