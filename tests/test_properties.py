"""Properties that hold for every input: random shapes, scales and temperatures."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pupil.methods import METHODS
from pupil.methods.adapters import regressor
from pupil.methods.base import Method
from pupil.methods.crd import CRD
from pupil.methods.functions import kl, same_size
from pupil.types import Batch, Features, Terms
from tests import tiny

few = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
many = settings(few, max_examples=60)
seeds = st.integers(0, 2**31)
temperatures = st.floats(0.05, 20)
every_method = pytest.mark.parametrize("name", METHODS)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the softened KL ---------------------------------------------------------------------------------------------------


@many
@given(seed=seeds, b=st.integers(1, 9), k=st.integers(2, 40), scale=st.floats(0.01, 100), T=temperatures)
def test_kl_is_zero_between_equals_and_positive_between_others(seed: int, b: int, k: int, scale: float, T: float) -> None:
    z_s, z_t = scale * normal(seed, b, k), scale * normal(seed + 1, b, k)
    noise = 1e-6 * T**2 * max(1.0, scale / T)
    assert kl(z_s, z_t, T).item() >= -noise
    assert abs(kl(z_t, z_t, T).item()) <= noise
    assert abs(kl(z_t + 3.0, z_t, T).item()) <= 10 * noise, "a constant added to all logits changes nothing"
    p, q = (z_t / T).softmax(1), (z_s / T).softmax(1)
    pinsker = (p - q).abs().sum(1).square().mean() / 2  # KL >= |p - q|^2 / 2
    assert kl(z_s, z_t, T).item() >= 0.999 * T**2 * pinsker.item() - noise


@many
@given(seed=seeds, T=temperatures)
def test_kl_agrees_with_the_sum_written_out_in_float64(seed: int, T: float) -> None:
    z_s, z_t = normal(seed, 6, 9), normal(seed + 1, 6, 9)
    p, q = (z_t.double() / T).softmax(1), (z_s.double() / T).softmax(1)
    slow = T**2 * (p * (p.log() - q.log())).nan_to_num(0.0).sum() / 6
    assert kl(z_s, z_t, T).item() == pytest.approx(slow.item(), rel=1e-3, abs=1e-5)


# --- shapes ------------------------------------------------------------------------------------------------------------


@many
@given(seed=seeds, h_s=st.integers(1, 13), h_t=st.integers(1, 13))
def test_regressor_meets_the_teacher_in_channels_and_size(seed: int, h_s: int, h_t: int) -> None:
    f_s, f_t = normal(seed, 2, 3, h_s, h_s), normal(seed + 1, 2, 5, h_t, h_t)
    a, b = same_size(regressor(f_s.shape, f_t.shape).eval()(f_s), f_t)
    assert a.shape == b.shape
    assert a.min() >= 0


# --- every method ------------------------------------------------------------------------------------------------------


OWN_KL = {"ls", "ctkd", "mlkd", "sakd"}  # have a KL of their own, and refuse another


def hyper(name: str, T: float = 4.0) -> dict[str, Any]:
    """Every term on, and every temperature the method has at T."""
    config = METHODS[name].Config()
    hot = {"T": T, "T_head": T}
    return {"ce": 1.0, "kl": float(name not in OWN_KL), "beta": config.beta} | {
        n: v for n, v in hot.items() if hasattr(config, n)
    }


def scaled(f: Features, by: float) -> Features:
    return f._replace(logits=by * f.logits, embedding=by * f.embedding)


def features(method: Method, batch: Batch) -> tuple[Features, Features]:
    """What the method gives its loss, which may be of several views."""
    given: list[tuple[Features, Features]] = []

    def keep(s: Features, t: Features, batch: Batch) -> Terms:
        given.append((s, t))
        return {}

    with torch.no_grad():
        t = method.teacher.features(batch.images)
    method(batch, t, keep)
    return given[0]


def picked(batch: Batch, rows: Tensor) -> Batch:
    return Batch(batch.images[rows], batch.labels[rows], batch.ids[rows], batch.epoch, batch.strong[rows])  # type: ignore[index]


def loss_of(method: Method, s: Features, t: Features, batch: Batch) -> Tensor:
    return torch.stack([term.weight * term.raw for term in method.loss(s, t, batch).values()]).sum()


@every_method
@few
@given(seed=seeds, T=temperatures)
def test_loss_and_gradients_are_finite_at_a_hundred_times_the_logits(name: str, seed: int, T: float) -> None:
    method = tiny.make(name, hyper(name, T))
    torch.manual_seed(seed)
    batch = tiny.first_batch()
    batch = batch._replace(images=torch.randn_like(batch.images))
    s, t = features(method, batch)
    loss = loss_of(method, scaled(s, 100), scaled(t, 100), batch)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
    assert any(p.grad is not None for p in method.student.parameters())


ORDERED = {  # why the order of the batch matters
    "crd": "each position of the batch draws its own negatives",
    "crdth": "as crd",
    "cc": "multiplies the differences of neighbours in the batch",
    "sakd": "each position of the batch draws its own gates",
    "semckd": "an image's similarities to the others enter its attention by their places in the batch",
}
SIZED = {  # why twice the same batch has another loss
    "sakd": "every copy of an image draws its own gates, and the agent's penalty is half a batch",
    **dict.fromkeys(("kde", "kdeth"), "their term is a sum over the batch"),
    "sp": "a row of similarities has unit norm, and its loss is a mean over all pairs",
    "rkd": "copies of an image are pairs without a distance, which lower the mean distance",
    "mlkd": "its class and batch terms are sums over all images and over all pairs",
    "pkt": "a row of probabilities sums to one, and its loss is a mean over all pairs",
    "cskd": "copies of an image are pairs of one class, and the norm of a class is over its images",
}


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ORDERED])
@few
@given(seed=seeds)
def test_loss_does_not_depend_on_the_order_of_the_batch(name: str, seed: int) -> None:
    method, batch = tiny.make(name, hyper(name)), tiny.first_batch()
    order = torch.randperm(len(batch.labels), generator=torch.Generator().manual_seed(seed))
    s, t = features(method, batch)
    moved = picked(batch, order)
    expected, found = loss_of(method, s, t, batch), loss_of(method, *features(method, moved), moved)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


@few
@given(seed=seeds)
def test_crd_does_not_depend_on_the_order_of_the_batch_once_the_negatives_are_drawn(seed: int) -> None:
    methods = [tiny.make("crd"), tiny.make("crd")]
    batch = tiny.first_batch()
    order = torch.randperm(len(batch.labels), generator=torch.Generator().manual_seed(seed))
    s, t = features(methods[0], batch)
    rows = torch.cat([batch.ids[:, None], methods[0].negatives(batch.labels)], 1)
    methods[1].load_state_dict(methods[0].state_dict())
    losses = [
        m.contrast(s.embedding[o], t.embedding[o], rows[o]) for m, o in zip(methods, (order.sort()[0], order), strict=True)
    ]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-4)
    torch.testing.assert_close(methods[0].bank_s, methods[1].bank_s)


@many
@given(seed=seeds, classes=st.integers(2, 6))
def test_crd_draws_negatives_from_all_other_classes_and_only_those(seed: int, classes: int) -> None:
    around = tiny.setup()
    labels = torch.randint(0, classes, (24,), generator=torch.Generator().manual_seed(seed))
    labels[:2] = torch.tensor([0, classes - 1])  # two classes at least; some may be empty
    method = CRD(around.__class__(around.student, around.teacher, around.s, around.t, labels), CRD.Config(k=400, dim=4))
    torch.manual_seed(seed)
    drawn = method.negatives(labels)
    assert drawn.shape == (24, 400)
    assert (labels[drawn] != labels[:, None]).all()
    for i in (0, 1):
        assert set(drawn[i].tolist()) == {j for j in range(24) if labels[j] != labels[i]}


@every_method
@few
@given(seed=seeds)
def test_batch_of_one_gives_a_finite_loss(name: str, seed: int) -> None:
    method, batch = tiny.make(name, hyper(name)), tiny.first_batch(1)
    torch.manual_seed(seed)
    loss = loss_of(method.train(), *features(method, batch), batch)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ORDERED | SIZED])
def test_loss_of_twice_the_same_batch_is_the_loss_of_the_batch(name: str) -> None:
    """Means, not sums, over the batch: the weights do not depend on its size."""
    method, batch = tiny.make(name, hyper(name)), tiny.first_batch()
    double = picked(batch, torch.arange(2 * len(batch.labels)) % len(batch.labels))
    once, twice = (loss_of(method, *features(method, b), b).item() for b in (batch, double))
    assert twice == pytest.approx(once, rel=1e-4)
