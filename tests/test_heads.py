"""Student and teacher share classifiers: formulas, borrowed classifiers, answers by either or both, and SH-KD's question."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pupil import checkpoint, figures, similarity, standalone
from pupil.adopt import adopt
from pupil.measures import parameters
from pupil.methods import METHODS
from pupil.methods.base import Method
from pupil.methods.heads import TeachersHead, TwoHeads
from pupil.models import build
from pupil.net import Net, cut, probe
from pupil.rows import Cell
from pupil.types import UserError
from tests import tiny
from tests.reference.blocks import batch_of, given, said, setup_of
from tests.test_checkpoint import FACTS, saved
from tests.test_relations import ES, ET16, g

HEADED = [name for name, method in METHODS.items() if issubclass(method, TeachersHead)]
Numbers = list[list[float]]


# --- formulas -------------------------------------------------------------------------------------------------------------


def softened_kl(z_s: Numbers, z_t: Numbers, T: float) -> float:
    """T^2 KL(teacher || student), mean over the images, in loops."""

    def shares(z: list[float]) -> list[float]:
        e = [math.exp(v / T) for v in z]
        return [v / sum(e) for v in e]

    pairs = [(shares(a), shares(b)) for a, b in zip(z_s, z_t, strict=True)]
    return T * T * sum(p * math.log(p / q) for s, t in pairs for q, p in zip(s, t, strict=True)) / len(pairs)


def directions(e_s: Numbers, e_t: Numbers) -> float:
    """The sum of (e_s / |e_s| - e_t / |e_t|)^2, in loops."""
    norm = math.hypot
    return sum((a / norm(*u) - b / norm(*v)) ** 2 for u, v in zip(e_s, e_t, strict=True) for a, b in zip(u, v, strict=True))


def through(head: nn.Linear, e: Numbers) -> Numbers:
    w, b = head.weight.double().tolist(), head.bias.double().tolist()
    return [[sum(x * y for x, y in zip(row, u, strict=True)) + c for row, c in zip(w, b, strict=True)] for u in e]


@pytest.mark.parametrize("name", ["thkd", "kde", "kdeth"])
@pytest.mark.parametrize(("batch", "width", "classes"), [(5, 7, 3), (1, 16, 11)])
def test_terms_are_their_formula(name: str, batch: int, width: int, classes: int) -> None:
    torch.manual_seed(batch)
    student, teacher = given(nn.Linear(width, classes)), given(nn.Linear(width, classes))
    e_s, e_t = 3 * torch.randn(batch, width, 1, 1), torch.randn(batch, width, 1, 1)
    s, t = student.features(e_s), teacher.features(e_t)
    hp: dict[str, Any] = {"ce": 0.3, "kl": 0.7, "beta": 0.11, "T": 2.5}
    hp |= {"T_head": 3.5} if name != "kde" else {}
    hp |= {"delta": 0.13} if name == "kdeth" else {}
    terms = METHODS[name](setup_of(s, t, student, teacher), METHODS[name].Config(**hp)).loss(s, t, batch_of(e_s))
    u, v = ([x.double().tolist() for x in e.flatten(1)] for e in (e_s, e_t))
    heads: Any = teacher.head
    z_s, z_t, z_h = s.logits.double().tolist(), t.logits.double().tolist(), through(heads, u)
    expected = {"kl": (0.7, softened_kl(z_s, z_t, 2.5))}
    expected["knowledge"] = (0.11, softened_kl(z_h, z_t, 3.5) if name == "thkd" else directions(u, v))
    expected |= {"teachers_head": (0.13, softened_kl(z_h, z_t, 3.5))} if name == "kdeth" else {}
    assert {key: term.weight for key, term in terms.items()} == {"ce": 0.3} | {key: w for key, (w, _) in expected.items()}
    for key, (_, value) in expected.items():
        assert terms[key].raw.item() == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_kde_is_the_specification_s() -> None:
    e = ES.clone().requires_grad_()
    s, t = said(e), said(ET16)
    loss = METHODS["kde"](setup_of(s, t), METHODS["kde"].Config()).loss(s, t, batch_of(e))["knowledge"].raw
    loss.backward()
    assert e.grad is not None
    assert (loss.item(), e.grad.norm().item()) == pytest.approx((11.898094, 1.733906), rel=2e-5)


def test_kdth_is_the_specification_s() -> None:
    """Its student's embedding is what the teacher's classifier, here the identity, makes of it."""
    identity = nn.Linear(10, 10)
    identity.load_state_dict({"weight": torch.eye(10), "bias": torch.zeros(10)})
    z_h = g((6, 10), 24).mul(4).requires_grad_()
    s, t = said(z_h, torch.zeros(6, 10)), said(z_h.detach(), 4 * g((6, 10), 7))
    method = METHODS["thkd"](setup_of(s, t, given(nn.Linear(10, 10)), given(identity)), METHODS["thkd"].Config())
    loss = method.loss(s, t, batch_of(z_h))["knowledge"].raw
    loss.backward()
    assert z_h.grad is not None
    assert (loss.item(), z_h.grad.norm().item()) == pytest.approx((6.4405932, 0.4361382), rel=2e-5)


def test_crdth_is_crd_and_the_term_with_the_teacher_s_classifier() -> None:
    """Also where crd's weight is 0: the other term stays."""
    batch = tiny.first_batch()
    hp = {"beta": 0.7, "delta": 0.3, "T_head": 2.0}
    crdth, crd, thkd = tiny.make("crdth", hp), tiny.make("crd"), tiny.make("thkd", {"T_head": 2.0})
    with torch.no_grad():
        for ours, theirs in zip(crdth.parameters(), crd.parameters(), strict=True):
            ours.copy_(theirs)
        for bank in ("bank_s", "bank_t"):
            getattr(crdth, bank).copy_(getattr(crd, bank))
        s, t, values = crd.eval().student.features(batch.images), crd.teacher.features(batch.images), {}
        for name, method in (("crdth", crdth), ("crd", crd), ("thkd", thkd)):
            torch.manual_seed(0)
            values[name] = method.loss(s, t, batch)
    assert values["crdth"]["knowledge"] == (values["crd"]["knowledge"].raw, 0.7)
    assert values["crdth"]["teachers_head"] == (values["thkd"]["knowledge"].raw, 0.3)
    assert set(tiny.make("crdth", {"beta": 0.0}).loss(s, t, batch)) == {"ce", "kl", "teachers_head"}


# --- the student's classifier: own, init, frozen ----------------------------------------------------------------------------


def trained(name: str, head: str) -> Method:
    method = tiny.make(name, {"head": head})
    torch.manual_seed(0)
    tiny.train(method, method.teacher, epochs=1)
    return method


@pytest.mark.parametrize("name", ["kd", "fitnet", "crdth"])
def test_a_borrowed_classifier_starts_as_the_teacher_s_and_a_frozen_one_stays_it(name: str) -> None:
    ways = {head: tiny.make(name, {"head": head}) for head in ("own", "init", "frozen")}
    theirs = tiny.state(ways["own"].teacher.head)
    assert not tiny.same(tiny.state(ways["own"].student.head), theirs)
    assert tiny.same(tiny.state(ways["init"].student.head), theirs)
    assert tiny.same(tiny.state(ways["frozen"].student.head), theirs)
    held = {head: {key for key, _ in method.student.named_parameters()} for head, method in ways.items()}
    assert held["own"] == held["init"] == held["frozen"] | {"head.weight", "head.bias"}
    after = {head: tiny.state(trained(name, head).student.head) for head in ("init", "frozen")}
    assert not tiny.same(after["init"], theirs), "its own now"
    assert tiny.same(after["frozen"], theirs), "no weight decay either"


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("kd", {"head": "init"}), ("kde", {"head": "frozen"}), ("thkd", {"mix": 0.3}), ("crdth", {"mix": 1.0, "head": "init"})],
    ids=tiny.label,
)
def test_what_is_saved_answers_again_and_without_this_project(name: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    net, images = saved(tmp_path / "model", name, overrides), tiny.first_batch().images
    again, _ = checkpoint.load(tmp_path / "model")
    assert torch.equal(again(images), net(images))
    assert all(not p.requires_grad for p in again.parameters())
    meta = checkpoint.read_meta(tmp_path / "model")
    meta |= {"teacher": {"network": tiny.TEACHERS[0], "role": "teacher", "sha256": "0" * 64}}
    checkpoint.save(tmp_path / "told", net.state_dict(), meta)
    standalone.export(tmp_path / "told", tmp_path / "out")  # tries it where pupil cannot be imported
    assert ("log-probabilities" in (tmp_path / "out" / "load.py").read_text()) == ("mix" in overrides)


def test_a_frozen_classifier_s_weights_are_counted() -> None:
    assert parameters(tiny.make("kd", {"head": "frozen"}).student) == parameters(tiny.make("kd").student)
    extra = 64 * tiny.CLASSES + tiny.CLASSES
    assert parameters(tiny.make("thkd", {"mix": 0.3}).student) == parameters(tiny.make("thkd").student) + extra


@pytest.mark.parametrize("head", ["init", "frozen"])
def test_what_cannot_borrow_is_refused_in_one_line(head: str) -> None:
    wide = tiny.setup("resnet8x4")
    with pytest.raises(UserError, match=rf"hp\.kd\.head={head} needs classifiers of equal shape.*got .*64.*256"):
        METHODS["kd"](wide, METHODS["kd"].Config(head=head))
    with pytest.raises(UserError, match=r"simkd deploys the teacher's classifier anyway; hp\.simkd\.head must be own"):
        tiny.make("simkd", {"head": head})
    for name in HEADED:
        with pytest.raises(UserError, match=rf"{name}: the embeddings .* equally wide, got 64 and 256; use simkd"):
            METHODS[name](wide, METHODS[name].Config())
    with pytest.raises(UserError, match=r"kde: the embeddings .* equally wide, got 64 and 256"):
        METHODS["kde"](wide, METHODS["kde"].Config())


@pytest.mark.parametrize("name", HEADED)
def test_impossible_settings_are_refused_in_one_line(name: str) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"mix": 1.1}, rf"hp\.{name}\.mix must be from 0 .* got 1\.1"),
        ({"T_head": 0.0}, rf"hp\.{name}\.T_head must be greater than 0"),
        ({"mix": 0.5, "head": "frozen"}, rf"hp\.{name}\.head=frozen makes both classifiers the teacher's"),
    ]
    if name != "thkd":
        wrong.append(({"delta": -1.0}, rf"hp\.{name}\.delta: expected 0 or more, got -1"))
    for overrides, says in wrong:
        with pytest.raises(UserError, match=says) as caught:
            tiny.make(name, overrides)
        assert "\n" not in str(caught.value)


# --- answers by either classifier or both -----------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(net: Net, teacher_head: Any, images: Tensor, mix: float) -> Tensor:
    f = net.eval().features(images)
    return (1 - mix) * f.logits.double().softmax(1) + mix * teacher_head(f.embedding).double().softmax(1)


@pytest.mark.parametrize("name", HEADED)
@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_all_three_answers_are_scored_and_one_of_them_is_deployed(name: str, mix: float) -> None:
    method = tiny.make(name, {"mix": mix})
    images, head, lines = tiny.first_batch().images, method.teacher.head, []
    shares = {"own_head": 0.0, "teachers_head": 1.0, "both_heads": mix if 0 < mix < 1 else 0.5}
    assert set(method.answers()) == {way for way, share in shares.items() if share != mix}
    with torch.no_grad():
        for way, answer in method.eval().answers().items():
            torch.testing.assert_close(answer(images).exp().double(), by_hand(method.student, head, images, shares[way]))
        torch.testing.assert_close(method.student(images).softmax(1).double(), by_hand(method.student, head, images, mix))
    tiny.train(method, method.teacher, epochs=1, log=lambda values, epoch: lines.append(values))
    loader = tiny.loader(None)
    batches = list(loader.epoch(0))
    right = sum(
        int((by_hand(method.student, head, b.images, 1.0 if mix != 1 else 0.0).argmax(1) == b.labels).sum()) for b in batches
    )
    way = "teachers_head" if mix != 1 else "own_head"
    assert lines[-1][f"val/{way}/top1"] == pytest.approx(100 * right / loader.samples)


def test_a_student_under_the_teacher_s_classifier_has_one_answer() -> None:
    assert tiny.make("thkd", {"head": "frozen"}).answers() == {}


@torch.no_grad()
def test_two_heads_answer_in_any_mix_teach_with_their_own_and_are_cut_both() -> None:
    method = tiny.make("thkd", {"mix": 0.3})
    net, images = method.student.eval(), tiny.first_batch().images
    assert isinstance(net, TwoHeads)
    for mix in (0.0, 0.25, 1.0):
        net.mix = mix
        out = net(images)
        assert out.isfinite().all()
        torch.testing.assert_close(out.exp().double(), by_hand(net, method.teacher.head, images, mix))
    net.mix = 0.3
    f = net.features(images)
    assert torch.equal(f.logits, net.head(f.embedding))
    assert net(images).shape == (len(images), tiny.CLASSES)
    kept = [3, 0]
    own, theirs = f.logits[:, kept], method.teacher.head(f.embedding)[:, kept]
    cut(net, kept)
    assert net(images).shape == (len(images), 2)
    torch.testing.assert_close(net(images).exp(), 0.7 * own.softmax(1) + 0.3 * theirs.softmax(1))
    torch.testing.assert_close(net.features(images).logits, own)


@pytest.mark.parametrize("method", ["kd", "srrl", "simkd", "kdeth"])
def test_a_student_with_two_classifiers_teaches(method: str) -> None:
    setup = tiny.setup()
    lent = tiny.make("thkd", {"mix": 0.3}).student.requires_grad_(False).eval()
    taught = METHODS[method](
        replace(setup, teacher=lent, t=probe(lent, tiny.SIZE)), METHODS[method].Config(**tiny.QUICK.get(method, {}))
    )
    before = tiny.state(lent)
    tiny.train(taught, lent, epochs=1)
    assert tiny.same(before, tiny.state(lent))


# --- an answer chosen afterwards --------------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Folders: teacher, and its students `own` (mix 0), `mixed` (0.3) and `kd`."""
    method = tiny.make("thkd", {"mix": 0.3})
    checkpoint.save(
        tmp_path / "teacher", method.teacher.state_dict(), {"network": tiny.TEACHERS[0], "method": None, "surgery": {}, **FACTS}
    )
    sha = checkpoint.read_meta(tmp_path / "teacher")["sha256"]
    meta = {"network": tiny.STUDENT, "teacher": {"network": tiny.TEACHERS[0], "sha256": sha}, **FACTS}
    own = {key: value for key, value in method.student.state_dict().items() if not key.startswith("teacher_head.")}
    checkpoint.save(tmp_path / "own", own, {**meta, "method": "thkd", "surgery": {}, "metrics": {"test/top1": 1.0}})
    checkpoint.save(tmp_path / "mixed", method.student.state_dict(), {**meta, "method": "thkd", "surgery": method.surgery})
    checkpoint.save(tmp_path / "kd", own, {**meta, "method": "kd", "surgery": {}})
    return tmp_path


def chosen(folder: Path, mix: float, teacher: Path | None = None, out: str = "out") -> Path:
    adopt(folder, None, None, None, None if teacher is None else str(teacher), folder.with_name(out), mix=mix)
    return folder.with_name(out)


@pytest.mark.parametrize("mix", [0.0, 0.6, 1.0])
def test_a_saved_student_answers_by_either_classifier_or_both(mix: float, models: Path) -> None:
    images = tiny.first_batch().images
    teacher, _ = checkpoint.load(models / "teacher")
    for source, lender in (("mixed", None), ("own", models / "teacher" if mix else None)):
        net, meta = checkpoint.load(chosen(models / source, mix, lender, out=f"{source}-again"))
        torch.testing.assert_close(net(images).softmax(1).double(), by_hand(net, teacher.head, images, mix))
        assert "metrics" not in meta, "those of another answer"
        assert ("mix" in meta["surgery"]) == (mix > 0)
    standalone.export(models / "mixed-again", models / "export")


@pytest.mark.parametrize(
    ("source", "mix", "teacher", "says"),
    [
        ("kd", 0.5, None, r"--mix is for the students of thkd, kdeth, crdth, .*kd holds a student of kd: leave it out"),
        ("teacher", 0.5, None, "holds a network trained alone"),
        ("mixed", 1.5, None, r"--mix: expected a number from 0 .* got 1\.5"),
        ("own", 0.5, None, "has its own classifier alone; give --teacher"),
        ("own", 0.5, "kd", "is not the teacher of .*, which was a resnet14 of another training"),
        ("mixed", 0.5, "teacher", "--teacher has no effect: the student has that classifier"),
        ("own", 0.0, "teacher", "--teacher has no effect: the mix is 0"),
    ],
)
def test_an_answer_that_cannot_be_is_refused_in_one_line(
    source: str, mix: float, teacher: str | None, says: str, models: Path
) -> None:
    with pytest.raises(UserError, match=says) as caught:
        chosen(models / source, mix, None if teacher is None else models / teacher)
    assert "\n" not in str(caught.value)
    assert not (models / "out").exists()


def test_what_a_model_folder_says_itself_is_not_given_again(models: Path) -> None:
    with pytest.raises(UserError, match="is a model folder, which says all but --mix: leave out --arch, --data"):
        adopt(models / "mixed", "resnet8", "cifar10", None, None, models / "out", mix=0.5)


# --- how alike classifiers are ----------------------------------------------------------------------------------------------


def folder_with(path: Path, head: Tensor, classes: int = tiny.CLASSES) -> Path:
    """A model folder of a resnet8 (64 wide) or a resnet8x4 (256) with that classifier."""
    name = "resnet8" if head.shape[1] == 64 else "resnet8x4"
    net = build(name, classes)
    with torch.no_grad():
        net.head.weight.copy_(head)  # type: ignore[operator, union-attr]
    facts = {**FACTS, "classes": [f"class {i}" for i in range(classes)]}
    checkpoint.save(path, net.state_dict(), {"network": name, "method": None, "surgery": {}, **facts})
    return path


def test_similarity_is_the_cosine_per_class_of_equally_wide_classifiers_over_seeds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    heads = {name: torch.randn(tiny.CLASSES, 64) for name in ("t", "a0", "a1", "d0", "d1")}
    at = {name: folder_with(tmp_path / name, head) for name, head in heads.items()}
    at["shkd"] = folder_with(tmp_path / "shkd", heads["a0"])  # the first student's classifier
    at["wide"] = folder_with(tmp_path / "wide", torch.randn(tiny.CLASSES, 256))
    at["other"] = folder_with(tmp_path / "other", torch.randn(7, 64), classes=7)
    cells = [Cell("T", None, None, 0, at["t"]), Cell("W", None, None, 0, at["wide"]), Cell("O", None, None, 0, at["other"])]
    cells += [Cell("T (SH-KD, s)", "T", None, 0, at["shkd"])]
    cells += [Cell("s alone", None, None, seed, at[f"a{seed}"]) for seed in (0, 1)]
    for teacher, label in (("t", "T"), ("shkd", "T (SH-KD)"), ("wide", "W"), ("other", "O")):
        cells += [Cell(f"s by kd from {label}", "s alone", at[teacher], seed, at[f"d{seed}"]) for seed in (0, 1)]

    def cosines(a: Tensor, b: Tensor) -> list[float]:
        return [
            sum(x * y for x, y in zip(u, v, strict=True)) / (math.hypot(*u) * math.hypot(*v))
            for u, v in zip(a.tolist(), b.tolist(), strict=True)
        ]

    def mean(pairs: list[tuple[str, str]]) -> list[float]:
        columns = zip(*(cosines(heads[a], heads[b]) for a, b in pairs), strict=True)
        return [sum(column) / len(column) for column in columns]

    found, classes = similarity.compare(cells)
    assert classes == FACTS["classes"]
    expected = {
        "T (SH-KD, s) and T": [("a0", "t")],
        "s alone and T": [("a0", "t"), ("a1", "t")],
        "s alone and T (SH-KD, s)": [("a0", "a0"), ("a1", "a0")],
        "s by kd from T, with its teacher": [("d0", "t"), ("d1", "t")],
        "s by kd from T (SH-KD), with its teacher": [("d0", "a0"), ("d1", "a0")],
    }
    assert set(found) == set(expected), "neither the wide teacher's nor the other classes'"
    for name, pairs in expected.items():
        assert found[name].tolist() == pytest.approx(mean(pairs), abs=1e-6), name
    similarity.draw(cells, tmp_path)
    lines = (tmp_path / "head_similarity.csv").read_text().splitlines()
    assert lines[0] == ",".join(["classifiers", *classes])
    assert len(lines) == 1 + len(expected)
    assert (tmp_path / "head_similarity.png").stat().st_size > 1000


def test_without_two_equally_wide_classifiers_there_is_no_picture(tmp_path: Path) -> None:
    wide, narrow = (folder_with(tmp_path / str(n), torch.randn(tiny.CLASSES, n)) for n in (256, 64))
    similarity.draw([Cell("T", None, None, 0, wide), Cell("s by kd from T", "s alone", wide, 0, narrow)], tmp_path)
    assert not list(tmp_path.glob("head_similarity.*"))


def test_many_classes_and_pairs_fit_the_picture(tmp_path: Path) -> None:
    import matplotlib.image

    pairs = {f"student {i} by a method from a teacher (SH-KD), with its teacher": torch.rand(1000) for i in range(40)}
    figures.similarity(pairs, [str(i) for i in range(1000)], tmp_path / "many.png")
    height, width = matplotlib.image.imread(tmp_path / "many.png").shape[:2]
    assert max(height, width) <= 2100
