"""AT, SP, CC, VID, RKD, PKT, NST and KDSVD: the specification's numbers, degenerate inputs, refusals."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pupil.methods import METHODS
from pupil.methods.kdsvd import leading, signs
from pupil.methods.vid import VID
from pupil.models import build
from pupil.net import probe
from pupil.types import Features, UserError
from tests import tiny
from tests.reference.blocks import batch_of, setup_of
from tests.reference.checks_relations import of_layers

OWN: dict[str, Any] = {"ce": 0.0, "kl": 0.0, "beta": 1.0}
UNTRAINED = ("at", "sp", "rkd", "pkt", "nst", "kdsvd")  # cc and vid train layers of their own


def g(shape: tuple[int, ...], k: int) -> Tensor:
    """The specification's deterministic inputs (its section 8.1)."""
    t = np.arange(np.prod(shape), dtype=np.float64)
    return torch.from_numpy(np.sin(0.9 * t + 0.013 * (k + 1) * t**2 + 0.5 * k).astype(np.float32).reshape(shape))


def fill(module: nn.Module) -> None:
    parts = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    tensors = [p for m in parts for p in (m.weight, m.bias) if p is not None]
    with torch.no_grad():
        for i, p in enumerate(tensors):
            p.copy_((0.1 * torch.sin(0.7 * torch.arange(p.numel(), dtype=torch.float64) + i)).view_as(p))


def made(name: str, f_s: list[Tensor], f_t: list[Tensor], **config: Any) -> tuple[Any, Features, Features]:
    s, t = of_layers(f_s, f_s[0].dim() == 2), of_layers(f_t, f_t[0].dim() == 2)
    return METHODS[name](setup_of(s, t), METHODS[name].Config(**OWN | config)), s, t


def loss_of(method: Any, s: Features, t: Features) -> Tensor:
    return method.loss(s, t, batch_of(s.stem))["knowledge"].raw


FS, FT, FS2 = g((6, 8, 8, 8), 0), g((6, 12, 4, 4), 1), g((6, 12, 4, 4), 2)
ES, ET, ET16 = g((6, 16), 3), g((6, 24), 4), g((6, 16), 5)


@pytest.mark.parametrize(
    ("name", "f_s", "f_t", "loss", "slope"),
    [
        ("at", FS, FT, 0.00842126, 0.004082704),
        ("at", FS2, FS, 0.009834911, 0.003836766),
        ("sp", FS, FT, 0.003388217, 0.002437651),
        ("rkd", ES, ET, 2.089612, 1.160817),
        ("pkt", ES, ET, 0.01797221, 0.0085249),
        ("nst", FS, FT, 0.17509368, 0.02857904),
    ],
)
def test_loss_and_norm_of_gradient_are_the_specification_s(
    name: str, f_s: Tensor, f_t: Tensor, loss: float, slope: float
) -> None:
    x = f_s.clone().requires_grad_()
    found = loss_of(*made(name, [x], [f_t]))
    found.backward()
    assert found.item() == pytest.approx(loss, rel=2e-5)
    assert x.grad is not None
    assert x.grad.norm().item() == pytest.approx(slope, rel=2e-5)


def test_cc_without_its_embeddings_is_the_specification_s() -> None:
    x = ES.clone().requires_grad_()
    method, s, t = made("cc", [x], [ET16], dim=16)
    method.embed_s = method.embed_t = nn.Identity()
    loss = loss_of(method, s, t)
    loss.backward()
    assert x.grad is not None
    assert (loss.item(), x.grad.norm().item()) == pytest.approx((9.1576357, 3.021874), rel=2e-5)


def test_vid_is_the_specification_s() -> None:
    method, s, t = made("vid", [FS], [FT])
    fill(method.regress)
    loss = loss_of(method, s, t)
    loss.backward()
    assert (loss.item(), method.log_scale[0].grad.norm().item()) == pytest.approx((0.85376269, 0.02586107), rel=2e-5)


# --- singular vectors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(30, 8), (8, 30), (12, 12)])
def test_leading_vectors_and_their_gradient_are_those_of_the_svd(rows: int, columns: int) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(3, rows, columns), torch.randn(3, columns, 4)
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    values, v = leading(a, 4)
    _, sigma, vh = torch.linalg.svd(b, full_matrices=False)
    reference = vh.mT[:, :, :4] * signs(vh.mT[:, :, :4]).detach()
    torch.testing.assert_close(values.double(), sigma[:, :4], rtol=1e-4, atol=0)
    torch.testing.assert_close(v.double(), reference, rtol=0, atol=1e-4)
    (v * w).sum().backward()
    (reference * w).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert (a.grad - b.grad).norm() < 1e-3 * b.grad.norm()


def rank_one() -> Tensor:
    return torch.ones(2, 5, 4, 4) * torch.arange(1.0, 6.0)[:, None, None]


@pytest.mark.parametrize("axis", ["channels", "width"])
@pytest.mark.parametrize(
    "x", [torch.zeros(2, 5, 4, 4), torch.ones(2, 5, 4, 4), rank_one(), torch.eye(4).expand(2, 5, 4, 4)], ids=range(4)
)
def test_kdsvd_is_finite_where_singular_values_coincide(x: Tensor, axis: str) -> None:
    leaves = [x.clone().requires_grad_() for _ in range(3)]
    torch.manual_seed(0)
    method, s, t = made("kdsvd", list(leaves), [torch.randn_like(x) for _ in leaves], axis=axis)
    loss = loss_of(method, s, t)
    loss.backward()
    assert loss.isfinite()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


def test_kdsvd_shows_a_number_that_is_none() -> None:
    x = torch.randn(2, 5, 4, 4)
    x[0, 0, 0, 0] = torch.nan
    method, s, t = made("kdsvd", [x, x], [torch.randn_like(x)] * 2)
    assert loss_of(method, s, t).isnan()


# --- every one of them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNTRAINED)
def test_autocast_does_not_touch_the_loss(name: str) -> None:
    f_s, f_t = ([ES], [ET]) if name in ("rkd", "pkt") else ([FS2, FS2.flip(0)], [FT, FT.flip(0)])
    around = made(name, f_s, f_t)
    plain = loss_of(*around)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss_of(*around), plain)


@pytest.mark.parametrize("name", [*UNTRAINED, "cc", "vid"])
def test_student_that_says_nothing_has_finite_gradients(name: str) -> None:
    """All maps and embeddings zero; the teacher's are not."""
    f_s, f_t = ([ES], [ET]) if name in ("cc", "rkd", "pkt") else ([FS2, FS2], [FT, FT.flip(0)])
    if name == "sp":  # of the last maps alone
        f_s, f_t = f_s[:1], f_t[:1]
    leaves = [torch.zeros_like(f).requires_grad_() for f in f_s]
    loss = loss_of(*made(name, list(leaves), f_t))
    loss.backward()
    assert loss.isfinite()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.abs().max() < 1e5


@pytest.mark.parametrize("name", UNTRAINED)
def test_student_equal_to_the_teacher_has_the_least_loss(name: str) -> None:
    f = [ES] if name in ("rkd", "pkt") else [FT, FT.flip(0)]
    assert loss_of(*made(name, f, f)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "hp", "told"),
    [
        ("at", {"p": 0}, r"hp\.at\.p must be 1 or more, got 0"),
        ("sp", {"layers": "first"}, r"hp\.sp\.layers must be last or all, got 'first'"),
        ("cc", {"dim": 0}, r"hp\.cc\.dim must be positive, got 0"),
        ("vid", {"variance": 0.0}, r"hp\.vid\.variance must be greater than 1e-05, got 0\.0"),
        ("kdsvd", {"axis": "height"}, r"hp\.kdsvd\.axis must be channels or width"),
        ("kdsvd", {"k": 0}, r"k positive, got 'channels' and 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(name: str, hp: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        tiny.make(name, hp)
    assert "\n" not in str(caught.value)


def test_kdsvd_refuses_maps_of_other_channels_and_names_a_way_out() -> None:
    with pytest.raises(UserError, match=r"agree in channels, the student .* teacher .* hp\.kdsvd\.axis=width"):
        tiny.make("kdsvd", {}, teacher="wrn_16_2")
    tiny.make("kdsvd", {"axis": "width"}, teacher="wrn_16_2")


def test_pairs_with_unequal_numbers_of_stages_use_the_common_ones() -> None:
    student, teacher = build("ShuffleV1", 4), build("vgg8", 4)
    s, t = probe(student, 32), probe(teacher, 32)
    method = VID(setup_of(s, t, student, teacher), VID.Config())
    common = min(len(s.maps), len(t.maps))
    assert len(s.maps) != len(t.maps)
    assert len(method.regress) == len(method.spots) == common
    assert loss_of(method, s, t).isfinite()
