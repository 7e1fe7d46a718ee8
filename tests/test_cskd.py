"""CSKD's loss against its formulas written plainly in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pupil.methods.cskd import CSKD
from pupil.types import UserError
from tests import tiny
from tests.reference.blocks import batch_of, of_logits, said, setup_of, total
from tests.test_logit_formulas import ES, LT, g

SHAPES = [(7, 5, 3), (12, 3, 4), (16, 9, 2), (3, 4, 6), (1, 6, 3)]  # images, features, classes; some classes are absent


def kl_loops(z: Tensor, q: Tensor, t: float) -> Tensor:
    """T^2 / B * sum_i sum_k p_ik (ln p_ik - ln s_ik) over the student's classes."""
    loss = z.new_zeros(())
    for z_i, q_i in zip(z, q, strict=True):
        p, s = [x / t - torch.log(torch.exp(x / t).sum()) for x in (q_i, z_i)]
        for k in range(len(z_i)):
            loss = loss + p[k].exp() * (p[k] - s[k])
    return t**2 * loss / len(z)


def opl_loops(e: Tensor, y: Tensor, gamma: float) -> Tensor:
    sums, counts = [e.new_zeros(()), e.new_zeros(())], [0, 0]
    for i in range(len(e)):
        for j in range(len(e)):
            if i != j:
                other = int(y[i] != y[j])
                sums[other] = sums[other] + (e[i] * e[j]).sum() / e[i].norm() / e[j].norm()
                counts[other] += 1
    own, other = (s / (n + 1e-6) for s, n in zip(sums, counts, strict=True))
    return (1 - own) + gamma * other


def icv_loops(e: Tensor, y: Tensor, classes: int, axis: str) -> Tensor:
    loss = e.new_zeros(())
    for c in range(classes):
        members = e[y == c]
        if (axis == "samples" and len(members) < 2) or not len(members):
            continue
        rows = members if axis == "features" else members.T
        v = [((x - x.sum() / len(x)) ** 2).sum() / (len(x) - 1) for x in rows]
        loss = loss + torch.stack([x**2 for x in v]).sum().sqrt()
    return loss


@pytest.mark.parametrize("axis", ["features", "samples"])
@pytest.mark.parametrize("t", [1.0, 4.0])
@pytest.mark.parametrize(("b", "d", "k"), SHAPES)
def test_loss_and_gradients_are_those_of_the_formulas(b: int, d: int, k: int, t: float, axis: str) -> None:
    g = torch.Generator().manual_seed(100 * b + k)
    e, z, q = (torch.randn(b, n, generator=g, dtype=torch.float64) for n in (d, k, k))
    y = torch.randint(0, k, (b,), generator=g)
    found, wanted = ([x.clone().requires_grad_() for x in (e, z)] for _ in range(2))
    hp = CSKD.Config(ce=0.7, kl=0.3, T=t, beta=2.0, opl=0.4, icv=0.6, gamma=0.8, icv_axis=axis)
    s = said(found[0].float(), found[1].float())
    loss = total(CSKD(setup_of(s, s), hp).loss(s, said(e.float(), q.float()), batch_of(s.embedding, y)))
    ce = -sum((wanted[1][i, y[i]] - wanted[1][i].exp().sum().log() for i in range(b)), torch.zeros(())) / b
    plain = 0.7 * ce + 0.3 * kl_loops(wanted[1], q, t)
    plain = plain + 2 * (0.4 * opl_loops(wanted[0], y, 0.8) + 0.6 * icv_loops(wanted[0], y, k, axis))
    torch.testing.assert_close(loss.double(), plain, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(loss, found, allow_unused=True), torch.autograd.grad(plain, wanted, allow_unused=True), strict=True
    ):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs, rtol=1e-4, atol=1e-6)


def test_numbers_are_the_authors() -> None:
    """Of ../shared/reference/methods.md, section 8.1."""
    z, t = g((6, 5), 25, 4).requires_grad_(), of_logits(LT[:, [4, 6, 2, 7, 3]])
    off: dict[str, Any] = {"ce": 0.0, "kl": 0.0, "opl": 0.0, "icv": 0.0}
    rows: list[tuple[Any, ...]] = [({"kl": 0.1}, z, of_logits(z), t, (0.24255176, 0.03524494))]
    for name, numbers in (("opl", (0.10801077, 0.03695412)), ("icv", (0.24334159, 0.07372682))):
        e = ES.clone().requires_grad_()
        s = said(e, torch.zeros(6, 5))
        rows.append(({name: 0.1}, e, s, s, numbers))
    for on, x, s, t, (value, gradient) in rows:
        batch = batch_of(s.embedding, torch.tensor([0, 1, 1, 2, 0, 4]))
        loss = total(CSKD(setup_of(s, t), CSKD.Config(**(off | on))).loss(s, t, batch))
        assert loss.item() == pytest.approx(value, rel=1e-5)
        assert torch.autograd.grad(loss, x)[0].norm().item() == pytest.approx(gradient, rel=1e-5)


def test_orthogonal_classes_that_are_parallel_in_themselves_cost_nothing() -> None:
    e = torch.tensor([[2.0, 0], [5, 0], [0, 3], [0, 1]])
    s, y = said(e, torch.zeros(4, 2)), torch.tensor([0, 0, 1, 1])
    loss = total(CSKD(setup_of(s, s), CSKD.Config(ce=0, kl=0, opl=1, icv=0)).loss(s, s, batch_of(e, y)))
    assert loss.abs() < 1e-6


def test_weights_are_those_of_the_authors_and_an_unknown_axis_is_one_line() -> None:
    hp, readme = CSKD.Config(), CSKD.presets["readme"]
    assert (hp.ce, hp.kl, hp.beta * hp.opl, hp.beta * hp.icv, hp.T, hp.gamma) == (1.0, 0.2, 0.2, 0.2, 1.0, 0.5)
    assert readme == {"kl": 0.1, "opl": 0.1, "icv": 0.1}
    with pytest.raises(UserError, match=r"^cskd: hp\.cskd\.icv_axis must be features or samples, got 'rows'$"):
        tiny.make("cskd", {"icv_axis": "rows"})
