"""Methods on logits and embeddings against their formulas, written out in loops, and against the authors' numbers."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pupil.methods import METHODS, contrast
from pupil.methods.base import Method
from pupil.methods.crd import CRD
from pupil.methods.dkd import decoupled
from pupil.methods.uskd import USKD
from pupil.net import Net, Stage
from pupil.types import Terms, UserError
from tests import tiny
from tests.reference.blocks import batch_of, given, of_logits, said, setup_of, total


def g(shape: tuple[int, ...], k: int, scale: float = 1.0) -> Tensor:
    """The deterministic inputs that the authors' code was run on."""
    t = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(0.9 * t + 0.013 * (k + 1) * t**2 + 0.5 * k)).float().view(shape)


ES, ET, LS, LT = g((6, 16), 3), g((6, 24), 4), g((6, 10), 6, 4), g((6, 10), 7, 4)
Y = torch.tensor([0, 3, 3, 7, 9, 0])


def on_logits(name: str, z_s: Tensor, z_t: Tensor, labels: Tensor, **hp: Any) -> Terms:
    s, t = of_logits(z_s), of_logits(z_t)
    options: dict[str, Any] = {"ce": 0.0} | hp
    config = METHODS[name].Config(**options)
    return METHODS[name](setup_of(s, t), config).loss(s, t, batch_of(z_s, labels))


# --- numbers that the authors' code gave ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hp", "loss", "gradient"),
    [
        ("dkd", {"warmup": 1}, 56.844677, 3.982055),
        ("dist", {"beta": 1.0}, 31.770809, 1.586901),
        ("dist", {"beta": 1.0, "T": 1.0}, 2.0599978, 0.1682344),
        ("nkd", {"T": 3.0, "gamma": 3.5}, 83.720505, 1.673488),
        ("kdmse", {}, 0.05199456, 0.009481157),
        ("kd", {"kl": 1.0}, 7.14821, 0.4711939),
    ],
)
def test_loss_and_gradient_are_the_authors(name: str, hp: dict[str, Any], loss: float, gradient: float) -> None:
    z_s = LS.clone().requires_grad_()
    found = total(on_logits(name, z_s, LT, Y, **hp))
    found.backward()
    assert z_s.grad is not None
    assert found.item() == pytest.approx(loss, rel=1e-5)
    assert z_s.grad.norm().item() == pytest.approx(gradient, rel=1e-5)


def fill(*layers: nn.Module) -> None:
    parameters = [p for layer in layers for p in layer.parameters()]
    with torch.no_grad():
        for i, p in enumerate(parameters):
            p.copy_(0.1 * torch.sin(0.7 * torch.arange(p.numel()) + i).view_as(p))


def test_srrl_is_the_authors() -> None:
    head = nn.Linear(24, 10)
    fill(head)
    e_s = ES.clone().requires_grad_()
    s, t = said(e_s), said(ET, LT)
    method = METHODS["srrl"](setup_of(s, t, teacher=given(head)), METHODS["srrl"].Config(ce=0.0, kl=0.0))
    fill(method.connect[0])  # type: ignore[index]
    loss = total(method.loss(s, t, batch_of(e_s)))
    loss.backward()
    assert e_s.grad is not None
    assert loss.item() == pytest.approx(8.6343117, rel=1e-5)
    assert e_s.grad.norm().item() == pytest.approx(0.1373812, rel=1e-5)


# --- formulas in loops ----------------------------------------------------------------------------------------------------


def softmax(z: list[float], T: float) -> list[float]:
    top = max(z)
    e = [math.exp((x - top) / T) for x in z]
    return [x / sum(e) for x in e]


def without(z: list[float], y: int) -> list[float]:
    return [x for c, x in enumerate(z) if c != y]


def pearson(a: list[float], b: list[float]) -> float:
    a, b = [x - sum(a) / len(a) for x in a], [x - sum(b) / len(b) for x in b]
    lengths = [math.sqrt(sum(x * x for x in v)) for v in (a, b)]
    return sum(x * y for x, y in zip(a, b, strict=True)) / (lengths[0] * lengths[1] + 1e-8)


def dkd_in_loops(z_s: Tensor, z_t: Tensor, labels: list[int], T: float) -> dict[str, float]:
    found = {"tckd": 0.0, "nckd": 0.0}
    for a, b, y in zip(z_s.tolist(), z_t.tolist(), labels, strict=True):
        p, q = softmax(a, T)[y], softmax(b, T)[y]
        found["tckd"] += T**2 * (q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)))
        pairs = zip(softmax(without(a, y), T), softmax(without(b, y), T), strict=True)
        found["nckd"] += T**2 * sum(v * math.log(v / u) for u, v in pairs)
    return {name: value / len(labels) for name, value in found.items()}


def nkd_in_loops(z_s: Tensor, z_t: Tensor, labels: list[int], T: float) -> dict[str, float]:
    found = {"label": 0.0, "others": 0.0}
    for a, b, y in zip(z_s.tolist(), z_t.tolist(), labels, strict=True):
        found["label"] -= softmax(b, 1)[y] * math.log(softmax(a, 1)[y])
        pairs = zip(softmax(without(a, y), T), softmax(without(b, y), T), strict=True)
        found["others"] -= T**2 * sum(v * math.log(u) for u, v in pairs)
    return {name: value / len(labels) for name, value in found.items()}


def dist_in_loops(z_s: Tensor, z_t: Tensor, labels: list[int], T: float) -> dict[str, float]:
    p, q = ([softmax(row, T) for row in z.tolist()] for z in (z_s, z_t))
    images = [pearson(a, b) for a, b in zip(p, q, strict=True)]
    classes = [pearson([row[c] for row in p], [row[c] for row in q]) for c in range(z_s.shape[1])]
    return {name: T**2 * (1 - sum(r) / len(r)) for name, r in (("inter", images), ("intra", classes))}


def kdmse_in_loops(z_s: Tensor, z_t: Tensor, labels: list[int], T: float) -> dict[str, float]:
    rows = zip(z_s.tolist(), z_t.tolist(), strict=True)
    squares = [(u - v) ** 2 for a, b in rows for u, v in zip(softmax(a, 1), softmax(b, 1), strict=True)]
    return {"knowledge": sum(squares) / len(squares)}


def wttm_in_loops(z_s: Tensor, z_t: Tensor, labels: list[int], T: float) -> dict[str, float]:
    loss = 0.0
    for a, b in zip(z_s.tolist(), z_t.tolist(), strict=True):
        powers = [p ** (1 / T) for p in softmax(b, 1)]
        target = [p / sum(powers) for p in powers]
        loss += sum(powers) * sum(p * math.log(p / q) for p, q in zip(target, softmax(a, 1), strict=True))
    return {"knowledge": loss / len(z_s)}


LOOPS = {
    "dkd": dkd_in_loops,
    "nkd": nkd_in_loops,
    "dist": dist_in_loops,
    "kdmse": kdmse_in_loops,
    "wttm": wttm_in_loops,
}


@pytest.mark.parametrize("T", [0.7, 1.0, 4.0])
@pytest.mark.parametrize("name", LOOPS)
def test_terms_are_their_formula(name: str, T: float) -> None:
    for b, k, seed in ((1, 2, 0), (5, 3, 1), (9, 30, 2)):
        draw = torch.Generator().manual_seed(seed)
        z_s, z_t = (2 * torch.randn(b, k, generator=draw, dtype=torch.float64) for _ in range(2))
        labels = torch.randint(0, k, (b,), generator=draw)
        found = on_logits(name, z_s, z_t, labels, T=T)
        expected = LOOPS[name](z_s, z_t, labels.tolist(), T)
        assert {n: term.raw.item() for n, term in found.items()} == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_uskd_is_its_formula() -> None:
    K, B, C = 7, 9, 5
    draw = torch.Generator().manual_seed(0)
    z, weak_map = 2 * torch.randn(B, K, generator=draw), torch.randn(B, C, 3, 3, generator=draw)
    labels = torch.randint(0, K, (B,), generator=draw)
    s = of_logits(z)._replace(maps=(weak_map, torch.zeros(B, 2, 1, 1)))
    method = USKD(setup_of(s, s), USKD.Config(ce=1.0))
    terms = method.loss(s, s, batch_of(z, labels))
    weak = nn.functional.linear(weak_map.mean((2, 3)), method.weak_head.weight, method.weak_head.bias).tolist()

    P, W = [softmax(row, 1) for row in z.tolist()], [softmax(row, 1) for row in weak]
    squares = [p[y] ** 2 for p, y in zip(P, labels.tolist(), strict=True)]
    expected = {"ce": 0.0, "label": 0.0, "others": 0.0, "weak": 0.0}
    for p, w, row, square, y in zip(P, W, z.tolist(), squares, labels.tolist(), strict=True):
        expected["ce"] -= math.log(p[y]) / B
        expected["label"] -= (square + 1 - sum(squares) / B) * math.log(p[y]) / B
        likely = [w[c] / (1 - w[y] + 1e-6) + p[c] / (1 - p[y] + 1e-6) for c in range(K)]
        ranks = [1 + sum(other > mine for other in likely) for mine in likely]
        zipf = [1 / r for c, r in enumerate(ranks) if c != y]
        q = softmax(without(row, y), 1)
        expected["others"] -= sum(u / sum(zipf) * math.log(v) for u, v in zip(zipf, q, strict=True)) / B
        expected["weak"] -= sum((0.9 * (c == y) + 0.1 / K) * math.log(w[c]) for c in range(K)) / B
    assert {n: term.raw.item() for n, term in terms.items()} == pytest.approx(expected, rel=1e-4)
    assert [term.weight for term in terms.values()] == [1.0, 1.0, 0.1, 0.005]


def test_uskd_takes_no_gradient_through_its_soft_labels_and_ignores_the_teacher() -> None:
    method, batch = tiny.make("uskd"), tiny.first_batch()
    s = method.student.features(batch.images)
    z = s.logits.detach().requires_grad_()
    total(method.loss(s._replace(logits=z), s, batch)).backward()
    p, y = z.detach().softmax(1), F.one_hot(batch.labels, tiny.CLASSES)
    square = (p * y).sum(1, keepdim=True).square()
    label = (square + 1 - square.mean()) * (p - y)
    terms = method.loss(s._replace(logits=z), s, batch)
    (others,) = torch.autograd.grad(terms["others"].raw, z)
    assert z.grad is not None
    torch.testing.assert_close(z.grad, (p - y + label) / len(z) + 0.1 * others)
    assert others.gather(1, batch.labels[:, None]).abs().max() == 0
    method.setup.teacher.head = nn.Identity()
    again = method.loss(s, s._replace(logits=torch.full((1,), math.nan)), batch)
    assert total(again).isfinite()


def test_dkd_is_kd_when_its_parts_are_weighed_as_in_kd() -> None:
    """KL = TCKD + (1 - p_t[y]) NCKD, for one image."""
    for i in range(6):
        z_s, z_t, y = LS[i : i + 1], LT[i : i + 1], Y[i : i + 1]
        tckd, nckd = decoupled(z_s, z_t, y, 4.0)
        (kl,) = on_logits("kd", z_s, z_t, y, kl=1.0).values()
        rest = 1 - (z_t / 4).softmax(1)[0, y[0]]
        torch.testing.assert_close(tckd + rest * nckd, kl.raw)


def test_dkd_stays_right_where_probabilities_vanish() -> None:
    """Log-odds of 8000 at T 0.05: the student is sure of class 0, the teacher of the label and of neither other class."""
    z_s, z_t = torch.zeros(1, 3, requires_grad=True), torch.zeros(1, 3)
    z_t[0, 1] = 400.0
    shifted = z_s + torch.tensor([[400.0, 0.0, 0.0]])
    tckd, nckd = decoupled(shifted, z_t, torch.tensor([1]), 0.05)
    (tckd + nckd).backward()
    assert tckd.item() == pytest.approx(0.05**2 * 8000, rel=1e-5)
    assert nckd.item() == pytest.approx(0.05**2 * (8000 / 2 - math.log(2)), rel=1e-5)
    assert z_s.grad is not None
    assert z_s.grad.tolist()[0] == pytest.approx([0.05 + 0.025, -0.05, -0.025], abs=1e-6)


def test_dkd_warms_up_and_reports_both_parts() -> None:
    method = tiny.make("dkd")
    batch = tiny.first_batch()
    f = method.student.features(batch.images)
    weights = [
        {n: term.weight for n, term in method.loss(f, f, batch._replace(epoch=epoch)).items()} for epoch in (1, 10, 20, 99)
    ]
    assert weights == [{"ce": 1.0, "tckd": x, "nckd": 8 * x} for x in (0.05, 0.5, 1.0, 1.0)]


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].on_logits])
def test_methods_on_logits_read_nothing_else_and_call_the_hard_label_term_ce(name: str) -> None:
    nothing = torch.zeros(0)
    s, t = (of_logits(z)._replace(stem=nothing, maps=(), pre=(), last=nothing, embedding=nothing) for z in (LS, LT))
    method = METHODS[name](setup_of(of_logits(LS), of_logits(LT)), METHODS[name].Config())
    terms = method.loss(s, t, batch_of(LS, Y))
    torch.testing.assert_close(terms["ce"].raw, F.cross_entropy(LS, Y))


@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "nkd"])
def test_temperature_can_be_learned(name: str) -> None:
    s, t = of_logits(LS), of_logits(LT)
    method = METHODS[name](setup_of(s, t), METHODS[name].Config())
    T = torch.tensor(3.0, requires_grad=True)
    method.hp = replace(method.hp, T=T)
    total(method.loss(s, t, batch_of(LS, Y))).backward()
    assert T.grad is not None
    h = 1e-2
    ends = [on_logits(name, LS, LT, Y, ce=method.hp.ce, T=3.0 + d) for d in (h, -h)]
    slope = (total(ends[0]) - total(ends[1])).item() / (2 * h)
    assert T.grad.item() == pytest.approx(slope, rel=1e-2)


# --- CRD ------------------------------------------------------------------------------------------------------------------


def plain_nce(v: Tensor, bank: Tensor, rows: Tensor, tau: float) -> Tensor:
    """The formula, left to autograd."""
    scores = torch.exp((bank[rows] * v[:, None]).sum(2) / tau)
    p, c = scores / (scores.detach().mean() * len(bank)), (rows.shape[1] - 1) / len(bank)
    return -(torch.log(p[:, 0] / (p[:, 0] + c + 1e-7)).sum() + torch.log(c / (p[:, 1:] + c + 1e-7)).sum()) / len(v)


@pytest.mark.parametrize("dense", [0, 10**6], ids=["pieces", "dense"])
def test_crd_scores_all_images_or_pieces_of_rows_with_the_numbers_of_the_formula(
    dense: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contrast, "DENSE", dense)
    monkeypatch.setattr(contrast, "PIECE", 3 * 31 * 8)  # three images at a time, of eight: an uneven rest
    method: Any = tiny.make("crd", {"k": 30})
    rows = torch.randint(0, tiny.SAMPLES, (8, 31), generator=torch.Generator().manual_seed(0))  # with repeats
    v, w = (F.normalize(g((8, 8), 1)).requires_grad_() for _ in range(2))
    loss, expected = method.nce(0, v, method.bank_t, rows), plain_nce(w, method.bank_t, rows, 0.07)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(v.grad, w.grad, rtol=1e-5, atol=1e-5)


def test_crd_keeps_half_precision_banks_on_request_with_nearly_the_same_loss() -> None:
    full, half = (tiny.make("crd", {"bank": bank}) for bank in ("float32", "float16"))
    assert isinstance(full, CRD)
    assert isinstance(half, CRD)
    assert full.bank_s.dtype == torch.float32
    half.load_state_dict(full.state_dict())
    assert half.bank_s.dtype == half.bank_t.dtype == torch.float16
    batch = tiny.first_batch()
    s, t = full.student.features(batch.images), full.teacher.features(batch.images)
    rows = torch.cat([batch.ids[:, None], full.negatives(batch.labels)], 1)
    losses = [m.contrast(s.embedding, t.embedding, rows).item() for m in (full, half)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    torch.testing.assert_close(half.bank_s.float(), full.bank_s, rtol=1e-3, atol=1e-3)


def test_crd_relaxed_draws_positives_of_the_class_and_updates_the_images_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    method: Any = tiny.make("crd", {"positive": "relax"})
    labels, batch = tiny.loader().labels, tiny.first_batch()
    torch.manual_seed(0)
    drawn = torch.stack([method.of_same_class(batch.labels) for _ in range(200)])
    assert (labels[drawn] == batch.labels).all()
    for i in range(3):
        assert set(drawn[:, i].tolist()) == set((labels == batch.labels[i]).nonzero()[:, 0].tolist())
    seen: list[Tensor] = []
    nce = CRD.nce
    monkeypatch.setattr(CRD, "nce", lambda self, side, v, bank, rows: seen.append(rows) or nce(self, side, v, bank, rows))
    before = method.bank_s.clone()
    s, t = method.student.features(batch.images), method.teacher.features(batch.images)
    method.loss(s, t, batch)
    assert (labels[seen[0][:, 0]] == batch.labels).all()
    assert (seen[0][:, 0] != batch.ids).any()
    changed = (method.bank_s != before).any(1).nonzero()[:, 0]
    assert sorted(batch.ids.tolist()) == changed.tolist()


def test_crd_shows_how_surely_the_positive_is_told_from_noise() -> None:
    method, batch = tiny.make("crd"), tiny.first_batch()
    assert isinstance(method, CRD)
    assert method.observed() == {}
    s, t = method.student.features(batch.images), method.teacher.features(batch.images)
    rows = torch.cat([batch.ids[:, None], method.negatives(batch.labels)], 1)
    with torch.no_grad():
        v, bank = contrast.unit(method.embed_s(s.embedding)), method.bank_t.clone()
        method.contrast(s.embedding, t.embedding, rows)
        p = torch.exp((bank[batch.ids] * v).sum(1) / 0.07) / method.Z[0]
    seen = method.observed()
    assert seen.keys() == {"positive_probability_s", "positive_probability_t"}
    assert seen["positive_probability_s"].item() == pytest.approx((p / (p + 16 / tiny.SAMPLES)).mean().item(), rel=1e-5)


def test_crd_announces_large_banks_before_it_takes_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.make("crd")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(contrast, "WORTH_SAYING", 1)
    tiny.make("crd", {"dim": 2**15, "bank": "float16"})  # 2 banks x 20 images x 2^15 x 2 bytes
    assert capsys.readouterr().out == "crd: two memory banks of 20 x 32768 float16 take 2 MiB of the device\n"


# --- mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hp", "says"),
    [
        ("crd", {"positive": "any"}, "positive must be exact or relax, got 'any'"),
        ("crd", {"bank": "int8"}, "bank must be float32 or float16, got 'int8'"),
        ("dkd", {"alpha": -1.0}, "alpha must be 0 or more, got -1"),
        ("dkd", {"warmup": 0}, "warmup must be 1 epoch"),
        ("dist", {"inter": -1.0}, "0 or more, got -1.0 and 1.0"),
        ("nkd", {"gamma": -1.0}, "gamma must be 0 or more"),
        ("uskd", {"mu": 0.0}, "mu greater than 0"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(name: str, hp: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as e:
        tiny.make(name, hp)
    assert "\n" not in str(e.value)


def test_uskd_refuses_a_student_of_one_stage() -> None:
    net = Net(nn.Identity(), [Stage(nn.Identity(), act=nn.ReLU())], nn.Linear(3, 4))
    f = net.features(torch.zeros(1, 3, 2, 2))
    with pytest.raises(UserError, match="maps of two stages or more, and it gives 1; use kd"):
        USKD(setup_of(f, f, net), USKD.Config())


@pytest.mark.parametrize("name", ["kd", "fitnet", "simkd", "thkd", "crd", "srrl", "dkd", "dist", "nkd", "uskd"])
def test_presets_are_values_of_the_methods_own_settings(name: str) -> None:
    cls: type[Method] = METHODS[name]
    assert {} in cls.presets.values(), "the suite or pair that the defaults come from"
    for values in cls.presets.values():
        config = replace(cls.Config(), **values)
        assert all(isinstance(getattr(config, n), type(getattr(cls.Config(), n))) for n in values)


def test_srrl_takes_a_batch_of_one_by_the_running_statistics() -> None:
    method: Any = tiny.make("srrl").train()
    norm = method.connect[1]
    x = torch.randn(1, norm.num_features, 1, 1)
    before = norm.running_mean.clone()
    found = norm(x)
    torch.testing.assert_close(found, norm.eval()(x))
    assert torch.equal(norm.running_mean, before)
    batch = tiny.first_batch(1)
    s, t = method.train().student.features(batch.images), method.teacher.features(batch.images)
    assert total(method.loss(s, t, batch)).isfinite()
