"""SAKD: routing by section 8.3 of the specification, subsets, modes, optimiser, what it shows, what it refuses."""

import zlib
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pupil import figures
from pupil.fit import activate, step, teacher_features
from pupil.methods.base import Chart, Sheet
from pupil.methods.functions import kl
from pupil.methods.routing import Crossing, Policy, frozen, walk
from pupil.methods.sakd import SAKD
from pupil.models import build
from pupil.net import Net, Stage, probe
from pupil.optim import Optim, make_optimizer
from pupil.types import Batch, Features, UserError
from tests import tiny
from tests.reference.blocks import setup_of

WRAPPED = ("fitnet", "at", "sp", "cc", "vid", "rkd", "pkt", "ft", "nst", "kdsvd", "crd")
SPOTS = {"at": 3, "vid": 3, "nst": 3, "kdsvd": 3}


def made(**values: Any) -> Any:
    method = tiny.make("sakd", values)
    activate(method, method.phases()[-1])
    return method


def seen(method: Any) -> tuple[Features, Features, Batch]:
    batch = tiny.first_batch()
    with torch.no_grad():
        t = method.teacher.features(batch.images)
    return method.student.features(batch.images), t, batch


def gates_of(rows: list[int], places: int) -> Tensor:
    return torch.zeros(8, places).index_fill_(0, torch.tensor(rows, dtype=torch.int64), 1.0)


# --- section 8.3 --------------------------------------------------------------------------------------------------------


def rule(key: str, shape: tuple[int, ...]) -> Tensor:
    """The filling of section 8.2."""
    n = int(np.prod(shape))
    u = (torch.arange(n) % 10007).double()
    wave = torch.sin(0.9 * u + 0.013 * u**2 + zlib.crc32(key.encode()) % 1000)
    return (wave / np.sqrt(n / shape[0]) if len(shape) > 1 else 0.1 * wave).reshape(shape)


def filled(name: str) -> Net:
    """A network of ten classes by the authors' keys, in float64."""
    net = build(name, 10).double().eval()
    keys = {"stem.0": "conv1", "head": "fc"}
    for key, value in net.named_parameters():
        module, _, last = key.rpartition(".")
        if isinstance(net.get_submodule(module), nn.BatchNorm2d):
            continue
        theirs = keys.get(module) or module.replace("stages.", "layer").replace("blocks.", "")
        if theirs.startswith("layer"):
            theirs = f"layer{int(theirs[5]) + 1}{theirs[6:]}"
        value.data.copy_(rule(f"{theirs}.{last}", tuple(value.shape)))
    return net


def test_routing_gives_the_numbers_of_section_8_3() -> None:
    teacher, student = filled("resnet8x4"), filled("resnet8")
    u = (torch.arange(4 * 3 * 32 * 32) % 10007).double()
    x = torch.sin(0.9 * u + 0.013 * u**2 + 40).reshape(4, 3, 32, 32)
    with torch.no_grad():
        z_t, z_s = teacher(x), student(x)
        assert z_t[0, 0].item() == pytest.approx(0.08736283, abs=1e-7)
        assert z_s[0, 0].item() == pytest.approx(0.08763757, abs=1e-7)
        one = setup_of(student.features(x[:1]), teacher.features(x[:1]), student, teacher)
        crossing = Crossing("sakd", one, (1, 2, 3)).double().train()
        for adapters in (crossing.to_teacher, crossing.to_student):
            for adapter in adapters:
                for key, value in adapter.get_submodule("0").named_parameters():
                    value.copy_(rule(f"conv.{key}", tuple(value.shape)))
        gates = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 0, 1]]).T.double()
        z = crossing(student, teacher, x, gates)
    assert z[0, 0].item() == pytest.approx(0.19444854, abs=1e-7)
    assert z[1, 0].item() == pytest.approx(0.13197319, abs=1e-7)
    assert z[3, 9].item() == pytest.approx(0.38017927, abs=1e-7)
    assert z.abs().sum().item() == pytest.approx(8.311118, abs=1e-5)


# --- walking over networks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "cskd_wrn_16_1", "resnet32_gl"])
def test_a_walk_in_pieces_gives_every_tap_and_the_logits(name: str) -> None:
    torch.manual_seed(0)
    net = build(name, 5).eval()
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        f = net.features(x)
        at = x
        for i, tap in enumerate([*f.taps, f.logits]):
            at = walk(net, at, i - 1, i)
            assert torch.allclose(at, tap, atol=1e-6)
            assert torch.allclose(walk(net, x, -1, i), tap, atol=1e-6)


def test_gates_of_one_network_give_its_own_answer() -> None:
    method = made().eval()
    batch = tiny.first_batch()
    with torch.no_grad():
        for value, net in ((1.0, method.teacher), (0.0, method.student)):
            z = method.agent.crossing(method.student, method.teacher, batch.images, torch.full((8, 4), value))
            assert torch.allclose(z, net(batch.images), atol=1e-5)


def test_what_is_frozen_gets_no_gradient_and_is_as_before_afterwards() -> None:
    net = build("resnet8", 4)
    net.stem.requires_grad_(False).eval()
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    with frozen(net):
        assert not net.training
        z = net(x)
    z.sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in net.parameters())
    assert net.training
    assert not net.stem.training
    assert {p.requires_grad for p in net.stem.parameters()} == {False}
    assert {p.requires_grad for p in net.stages.parameters()} == {True}


# --- subsets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", WRAPPED)
def test_all_gates_open_is_the_wrapped_method(of: str) -> None:
    torch.manual_seed(0)
    method = made(of=of)
    s, t, batch = seen(method)
    if of == "crd":  # both calls from the same banks, with the same negatives
        method.inner.Z.fill_(1e4)
    torch.manual_seed(1)
    before = tiny.state(method)
    terms = method.routed_by(torch.ones(8, SPOTS.get(of, 1) + 1), s, t, batch)
    method.load_state_dict(before)
    torch.manual_seed(1)
    expected = method.inner.loss(s, t, batch)
    assert expected.keys() == terms.keys() - {"agent"}
    for name, term in expected.items():
        assert terms[name].weight == term.weight
        assert terms[name].raw.item() == pytest.approx(term.raw.item(), rel=1e-5)


@pytest.mark.parametrize("of", ["at", "sp", "cc", "vid", "rkd", "pkt", "nst", "kdsvd"])
def test_every_spot_sees_the_rows_chosen_for_it(of: str) -> None:
    method = made(of=of)
    s, t, batch = seen(method)
    n = SPOTS.get(of, 1)
    sets = [[0, 1, 2, 5, 7], [3, 4], [1, 2, 6]][:n]
    gates = torch.stack([*(gates_of(rows, 1)[:, 0] for rows in sets), gates_of([2, 3, 4], 1)[:, 0]], 1)
    terms = method.routed_by(gates, s, t, batch)
    own = []
    for i, rows in enumerate(sets):  # each subset as a batch of its own
        a, b = method.student.eval().features(batch.images[rows]), method.teacher.features(batch.images[rows])
        part = Batch(batch.images[rows], batch.labels[rows], batch.ids[rows])
        own.append(len(rows) / 8 * method.inner.match(i, *method.inner.compared(a, b)[i], part))
    method.student.train()
    again = method.routed_by(gates, method.student.eval().features(batch.images), t, batch)
    assert again["knowledge"].raw.item() == pytest.approx(sum(x.item() for x in own), rel=1e-4)
    rows = [2, 3, 4]
    assert terms["kl"].raw.item() == pytest.approx(3 / 8 * kl(s.logits[rows], t.logits[rows], 4.0).item(), rel=1e-5)


@pytest.mark.parametrize("of", WRAPPED)
def test_no_gate_open_distils_nothing_except_ft_as_its_authors(of: str) -> None:
    method = made(of=of)
    s, t, batch = seen(method)
    terms = method.routed_by(torch.zeros(8, SPOTS.get(of, 1) + 1), s, t, batch)
    assert terms["kl"].raw.item() == 0
    expected = method.inner.knowledge(s, t, batch).item() if of == "ft" else 0
    assert terms["knowledge"].raw.item() == pytest.approx(expected, rel=1e-5)
    if of == "ft":
        zero = made(of=of, empty="zero")
        assert zero.routed_by(torch.zeros(8, 2), *seen(zero))["knowledge"].raw.item() == 0


@pytest.mark.parametrize("of", ["cc", "rkd", "sp", "pkt", "crd"])
def test_a_subset_of_one_image_gives_a_number(of: str) -> None:
    method = made(of=of)
    terms = method.routed_by(gates_of([3], 2), *seen(method))
    assert terms["knowledge"].raw.isfinite()
    terms["knowledge"].raw.backward() if terms["knowledge"].raw.requires_grad else None
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
    if of in ("cc", "rkd"):
        assert terms["knowledge"].raw.item() == 0


def test_crd_updates_the_rows_of_the_chosen_images_alone() -> None:
    method = made(of="crd")
    s, t, batch = seen(method)
    before = method.inner.bank_s.clone()
    method.routed_by(torch.cat([gates_of([1, 4], 1), torch.ones(8, 1)], 1), s, t, batch)
    moved = torch.nonzero((method.inner.bank_s != before).any(1)).flatten().tolist()
    assert moved == sorted(batch.ids[[1, 4]].tolist())


def test_the_teachers_side_of_cc_keeps_its_start_except_where_the_teacher_learns() -> None:
    for mode, still in (("adaptive", True), ("both", False)):
        method = made(of="cc", mode=mode)
        s, t, batch = seen(method)
        sum(term.raw for term in method.loss(s, t, batch).values()).backward()  # type: ignore[union-attr]
        assert (method.inner.embed_t.weight.grad is None) == still
        assert method.inner.embed_s.weight.grad is not None


# --- modes --------------------------------------------------------------------------------------------------------------


def test_reverse_distils_the_complement() -> None:
    gates = gates_of([0, 1, 5], 4)
    found = {mode: (m := made(mode=mode)).routed_by(gates, *seen(m)) for mode in ("adaptive", "reverse")}
    opposite = (m := made()).routed_by(1 - gates, *seen(m))
    for name in ("kl", "knowledge"):
        assert found["reverse"][name].raw.item() == pytest.approx(opposite[name].raw.item(), rel=1e-5)
    assert found["reverse"]["ce"].raw.item() == pytest.approx(found["adaptive"]["ce"].raw.item())


def test_random_tosses_a_fair_coin_and_several_spots_share_the_last_with_the_logits() -> None:
    for of, shared in (("at", True), ("rkd", False)):
        method = made(of=of, mode="random")
        s, t, batch = seen(method)
        many = s._replace(logits=s.logits[:1].expand(4000, -1))
        torch.manual_seed(0)
        gates = method.gates(many, t)
        assert gates.unique().tolist() == [0, 1]
        assert gates.mean(0).tolist() == pytest.approx([0.5] * gates.shape[1], abs=0.03)
        assert torch.equal(gates[:, -1], gates[:, -2]) == shared
        assert method.agent is None
        terms = method.loss(s, t, batch)
        assert "agent" not in terms
        assert terms["ce"].weight == 2
        assert not method.answers()


def test_both_trains_a_copy_of_the_teacher_and_leaves_the_teacher() -> None:
    method = made(mode="both", of="sp")
    s, _, batch = seen(method)
    before = tiny.state(method.teacher)
    twin = method.twin.train().features(batch.images)
    terms = method.routed_by(torch.zeros(8, 2), s, twin, batch)
    both = F.cross_entropy(s.logits, batch.labels) + F.cross_entropy(twin.logits, batch.labels)
    assert terms["ce"].raw.item() == pytest.approx(both.item(), rel=1e-6)
    with torch.no_grad(), frozen(method.student):
        assert terms["agent"].raw.item() == pytest.approx(
            F.cross_entropy(method.student(batch.images), batch.labels).item(), rel=1e-4
        )
    again = method.routed_by(torch.ones(8, 2), *[n.features(batch.images) for n in (method.student, method.twin)], batch)
    again["knowledge"].raw.backward()
    assert all(p.grad is not None for p in method.twin.stages.parameters())
    tiny.train(method, method.teacher, epochs=1)
    assert tiny.same(before, tiny.state(method.teacher))
    assert not tiny.same(before, tiny.state(method.twin))
    assert set(method.answers()) == {"routed", "trained_teacher"}


@pytest.mark.parametrize("of", WRAPPED)
def test_every_wrapped_method_moves_a_teacher_that_learns(of: str) -> None:
    method = made(of=of, mode="both")
    s, _, batch = seen(method)
    t = method.twin.features(batch.images)
    method.routed_by(torch.ones(8, SPOTS.get(of, 1) + 1), s, t, batch)["knowledge"].raw.backward()
    assert method.twin.stem[0].weight.grad.abs().max() > 0


def test_all_is_the_wrapped_method_with_its_weights() -> None:
    method = made(mode="all", beta=0.5, ce=2.0)
    s, t, batch = seen(method)
    terms, own = method.loss(s, t, batch), method.inner.loss(s, t, batch)
    assert {n: x.weight for n, x in terms.items()} == {"ce": 2.0, "kl": 0.5, "knowledge": 500.0}
    assert all(terms[n].raw.item() == own[n].raw.item() for n in own)


# --- the agent ----------------------------------------------------------------------------------------------------------


def test_gamma_pulls_the_routed_loss_away_from_the_students() -> None:
    method = made(gamma=2.0, of="at")
    _, t, batch = seen(method)
    gates = torch.ones(8, 4)  # the teacher's answer, and no penalty
    q = F.cross_entropy(t.logits, batch.labels).item()
    for ce, factor in ((0.0, 2.0), (100.0, 0.5)):
        found = method.judged(gates, torch.tensor(ce), t, batch).item()
        assert found == pytest.approx(factor * q, rel=1e-4)
    gates[2:, -1] = 0  # 2 of 8, where 4 are wanted
    with frozen(method.student, method.teacher), torch.no_grad():
        z = method.agent.crossing(method.student, method.teacher, batch.images, gates)
    found = method.judged(gates, torch.tensor(100.0), t, batch).item()
    assert found == pytest.approx(0.5 * F.cross_entropy(z, batch.labels).item() + 2, rel=1e-3)


@pytest.mark.parametrize(("of", "gamma"), [("at", 2), ("rkd", 2), ("vid", 2), ("fitnet", 1), ("sp", 1), ("crd", 1)])
def test_gamma_is_the_authors_for_the_wrapped_method(of: str, gamma: float) -> None:
    assert made(of=of).gamma == gamma
    assert made(of=of, gamma=3.0).gamma == 3


def test_the_agent_is_trained_by_its_own_loss_and_the_student_not_by_it() -> None:
    method = made()
    s, t, batch = seen(method)
    terms = method.loss(s, t, batch)
    terms["agent"].raw.backward(retain_graph=True)
    assert all(p.grad is not None for p in method.agent.parameters())
    assert all(p.grad is None for p in (*method.student.parameters(), *method.teacher.parameters()))
    found = [p.grad.clone() for p in method.agent.parameters() if p.grad is not None]
    torch.stack([terms[n].raw for n in ("ce", "kl", "knowledge")]).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(method.agent.parameters(), found, strict=True) if p.grad is not None)


def test_the_agent_has_half_the_learning_rate_and_a_weight_decay_of_its_own() -> None:
    (phase,) = made().phases()
    optimizer, _ = make_optimizer(phase, Optim(lr=0.05, weight_decay=5e-4))
    found = [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups if g["params"]]
    assert found == [(0.05, 5e-4), (0.025, 1e-3)]


def test_beside_a_learning_teacher_the_agent_is_slow_until_the_first_drop() -> None:
    (phase,) = made(mode="both").phases()
    optimizer, scheduler = make_optimizer(phase, Optim(epochs=6, lr=0.1, milestones=(2, 4)))
    rates = []
    for _ in range(6):
        rates.append([g["lr"] for g in optimizer.param_groups if g["params"]])
        optimizer.step()
        scheduler.step()
    main = [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    assert [r[0] for r in rates] == pytest.approx(main)
    assert [r[-1] for r in rates] == pytest.approx([0.0005, 0.0005, 0.005, 0.005, 0.0005, 0.0005])


def test_a_lean_begins_by_distilling_nearly_everything() -> None:
    torch.manual_seed(0)
    e = torch.randn(500, 4), torch.randn(500, 6)
    for lean, low, high in ((True, 0.99, 1.0), (False, 0.2, 0.8)):
        policy = Policy(10, 3, 5.0, lean)
        assert low <= policy.sampled(*e).mean().item() <= high
    both = made(mode="both", homogeneous=True)
    assert both.agent.policy.net.bias.abs().max() < 1, "the authors' trains without"


def test_the_policy_sees_the_teacher_first() -> None:
    policy = Policy(5, 1, 5.0)
    with torch.no_grad():
        policy.net.weight.zero_()[0, :2] = torch.tensor([1.0, 2.0])
        policy.net.bias.zero_()
    scores = policy.scores(torch.full((1, 3), 9.0), torch.tensor([[3.0, 4.0]]))
    assert scores.tolist() == [[[11.0, 0.0]]]


# --- what it shows ------------------------------------------------------------------------------------------------------


def test_shares_and_refusals_are_counted(tmp_path: Any) -> None:
    method = made(of="rkd")
    s, t, batch = seen(method)
    for epoch, rows in ((1, [0, 1]), (1, [0, 1, 2, 3]), (2, [0])):
        method.routed_by(torch.cat([gates_of(rows, 1), torch.ones(8, 1)], 1), s, t, batch._replace(epoch=epoch))
    assert method.shares().tolist() == [[6 / 16, 1 / 8], [1, 1]]
    shown = method.observed()
    assert {n: x.item() for n, x in shown.items()} == {"distilled_embedding": 1 / 8, "distilled_logits": 1}
    pictures = method.pictures()
    chart, sheet = pictures["distilled_share"], pictures["refused_by_policy"]
    assert isinstance(chart, Chart)
    assert isinstance(sheet, Sheet)
    assert list(chart.rows) == ["embedding", "logits"]
    assert sheet.ids[:4].tolist() == batch.ids[4:].tolist(), "refused three times"
    assert sheet.captions[0] == "75 %", "of two epochs at two places"
    assert batch.ids[0] not in sheet.ids
    images = torch.zeros(tiny.SAMPLES, 3, 8, 8, dtype=torch.uint8)
    labels = torch.zeros(tiny.SAMPLES, dtype=torch.int64)
    logits, table = torch.eye(4), torch.ones(4, 4)
    figures.draw_all(tmp_path, [], table, logits, torch.arange(4), images[:4], list("abcd"), shown, pictures, (images, labels))
    assert {"distilled_share.png", "refused_by_policy.png"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("mode", ["adaptive", "both"])
def test_the_routed_network_is_evaluated(mode: str) -> None:
    method = tiny.make("sakd", {"mode": mode})
    logged: list[dict[str, float]] = []
    optim = Optim(epochs=2, lr=0.01, milestones=())
    tiny.fit(
        method, method.teacher, tiny.loader(0), tiny.loader(None), optim, lambda v, e: logged.append(dict(v)), tiny.silently
    )
    assert len(logged) == 2
    for values in logged:
        assert 0 <= values["val/routed/top1"] <= 100
        assert all(0 <= values[f"distil/distilled_{place}"] <= 1 for place in ("spot_1", "spot_2", "spot_3", "logits"))
        assert ("val/trained_teacher/top1" in values) == (mode == "both")


def test_routed_answers_repeat_unless_they_are_sampled() -> None:
    for evaluate, same in (("likeliest", True), ("sampled", False)):
        method = made(evaluate=evaluate).eval()
        answer, images = method.answers()["routed"], tiny.first_batch().images
        with torch.no_grad():
            assert torch.equal(answer(images), answer(images)) == same


def test_ft_comes_with_its_first_phase() -> None:
    method = tiny.make("sakd", {"of": "ft"})
    init, distil = method.phases()
    assert (init.name, init.constant, distil.name) == ("init", True, "distil")
    for phase in (init, distil):
        activate(method, phase)
        optimizer, _ = make_optimizer(phase, Optim(lr=0.01))
        batch = tiny.first_batch()
        terms = step(method, teacher_features(method.teacher, batch), batch, phase, optimizer)
        assert set(terms) == ({"reconstruction"} if phase is init else {"ce", "kl", "knowledge", "agent"})
    assert all(p.grad is None for p in method.inner.paraphraser.parameters())  # type: ignore[union-attr]


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"of": "kd"}, "compares spot by spot (at, sp, vid, crd, ...), got 'kd'"),
        ({"of": "reviewkd"}, "got 'reviewkd'"),
        ({"of": "crdth"}, "got 'crdth'"),
        ({"of": "simkd"}, "deploys more than the student; use at or crd"),
        ({"of": "ls"}, "sakd cannot wrap ls; it is a wrapper itself"),
        ({"of": "sakd"}, "sakd cannot wrap sakd"),
        ({"of_preset": "x"}, "at has no preset 'x'"),
        ({"kl": 1.0}, "hp.sakd.kl must be 0"),
        ({"mode": "anti"}, "hp.sakd.mode must be one of adaptive, reverse, random, both, all, got 'anti'"),
        ({"tau": 0.0}, "greater than 0"),
        ({"mid": "1=4"}, "expected words SPOT:T, such as '1:4 2:2', got '1=4'"),
        ({"mid": "9:4"}, "maps at spots [0, 1, 2, 3], got 9"),
        ({"mid": "1:0"}, "temperature must be greater than 0"),
        ({"clusters": "1:0,1/2"}, "each class from 0 to 3 must be in one cluster"),
    ],
)
def test_what_is_impossible_is_one_line(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as e:
        tiny.make("sakd", values)
    assert said in str(e.value)
    assert "\n" not in str(e.value)


def test_a_network_whose_maps_are_tokens_is_refused_at_maps_alone() -> None:
    torch.manual_seed(0)
    stage = Stage(nn.Conv2d(3, 6, 3), act=nn.ReLU())
    stage.view = nn.Dropout(0.0)  # type: ignore[assignment]  # any view: what goes on is not the tap
    tokens = Net(nn.Identity(), [stage], nn.Linear(6, tiny.CLASSES))
    teacher = build("resnet8", tiny.CLASSES)
    setup = setup_of(probe(tokens, tiny.SIZE), probe(teacher, tiny.SIZE), tokens, teacher)
    with pytest.raises(UserError, match="sakd cannot cut the network at spot 1, where tokens go on"):
        SAKD(setup, SAKD.Config(of="at"))
    SAKD(setup, SAKD.Config(of="rkd"))


def test_networks_of_unequal_depth_meet_at_what_both_have() -> None:
    torch.manual_seed(0)
    student, teacher = build("resnet8", tiny.CLASSES), build("vgg8", tiny.CLASSES)
    setup = setup_of(probe(student, 32), probe(teacher, 32), student, teacher, samples=8)
    for of, places in (("at", [[1, 2, 3], [1, 2, 3]]), ("rkd", [[4], [5]]), ("sp", [[3], [4]])):
        method = SAKD(setup, SAKD.Config(of=of))
        assert method.agent is not None
        assert method.agent.crossing.spots == places
        x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % tiny.CLASSES
        terms = method.train()(Batch(x, y, torch.arange(8)), teacher.features(x), method.loss)
        assert all(term.raw.isfinite() for term in terms.values())
