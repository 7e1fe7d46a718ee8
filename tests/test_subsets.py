"""A teacher of more classes than its students': every method under what is left of it, and the comparison."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pupil import assemble, checkpoint, config, feeds, report, rows, session, tracking
from pupil import settings as settings_of
from pupil.data import prepare
from pupil.data.resident import Resident
from pupil.fit import teacher_features
from pupil.methods import METHODS
from pupil.methods.base import Setup
from pupil.methods.heads import TwoHeads
from pupil.methods.thkd import THKD
from pupil.models import build
from pupil.net import FrozenLinear, Net, cut, probe
from pupil.optim import Optim
from pupil.scoring import predict
from pupil.settings import Settings
from pupil.types import UserError
from tests import tiny
from tests.test_cskd import kl_loops

KNOWN = 7  # classes of the teacher
SUBSETS = [(5, 0, 6, 2), (4, 1)]
CUT = [*tiny.VARIANTS, *((name, {"head": head}) for name in ("cskd", "thkd", "kdeth", "crdth") for head in ("init", "frozen"))]


def cut_setup(kept: tuple[int, ...], teacher: str = tiny.TEACHERS[0], seed: int = 0) -> tuple[Setup, Net]:
    """A teacher that keeps those classes and a student of them; and the teacher as it was."""
    torch.manual_seed(1000)
    whole = build(teacher, KNOWN).requires_grad_(False).eval()
    short = copy.deepcopy(whole)
    cut(short, kept)
    torch.manual_seed(seed)
    student = build(tiny.STUDENT, len(kept))
    labels = torch.arange(tiny.SAMPLES) % len(kept)
    return Setup(student, short, probe(student, tiny.SIZE), probe(short, tiny.SIZE), labels, 8), whole


def images_of(kept: tuple[int, ...]) -> Resident:
    whole = tiny.loader()
    whole.labels = whole.labels % len(kept)
    return whole


@pytest.mark.parametrize("teacher", tiny.TEACHERS)
def test_a_cut_teacher_gives_the_same_taps_and_the_kept_logits_in_their_order(teacher: str) -> None:
    setup, whole = cut_setup(kept := SUBSETS[0], teacher)
    x = tiny.first_batch().images
    ours, theirs = setup.teacher.features(x), whole.features(x)
    torch.testing.assert_close(ours.logits, theirs.logits[:, list(kept)], rtol=1e-6, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(ours.taps, theirs.taps, strict=True))
    assert not any(m.training for m in setup.teacher.modules())
    assert not any(p.requires_grad for p in setup.teacher.parameters())
    p = theirs.logits.softmax(1)[:, list(kept)]
    torch.testing.assert_close(ours.logits.softmax(1), p / p.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("name", "overrides", "kept"),
    [(*variant, kept) for variant in CUT for kept in SUBSETS if len(kept) == tiny.CLASSES or "clusters" not in variant[1]],
    ids=tiny.label,
)  # clusters name the classes, of which tiny has four
def test_every_method_learns_from_a_cut_teacher(name: str, overrides: dict[str, Any], kept: tuple[int, ...]) -> None:
    setup, _ = cut_setup(kept)
    before = tiny.state(setup.teacher)
    method = METHODS[name](setup, METHODS[name].Config(**(tiny.QUICK.get(name, {}) | overrides)))
    optim, data = Optim(epochs=1, lr=0.01, milestones=()), images_of(kept)
    initial = tiny.state(method.student)
    trained = tiny.fit(method, setup.teacher, data, data, optim, tiny.quiet, tiny.silently)
    assert all(value.isfinite().all() for value in trained.last.values())
    assert not tiny.same(initial, trained.last)
    assert tiny.same(before, tiny.state(setup.teacher))
    net = METHODS[name].deployed(build(tiny.STUDENT, len(kept)), **json.loads(json.dumps(method.surgery)))
    net.load_state_dict(trained.last)
    assert net.eval()(tiny.first_batch().images).shape == (8, len(kept))


@pytest.mark.parametrize("name", ["thkd", "kdeth", "crdth", "simkd", "srrl"])
def test_the_teacher_s_classifier_that_a_student_is_given_is_the_cut_one(name: str) -> None:
    setup, whole = cut_setup(kept := SUBSETS[0])
    method = METHODS[name](setup, METHODS[name].Config(**tiny.QUICK.get(name, {})))
    (lent,) = (m for m in method.modules() if isinstance(m, FrozenLinear))
    assert torch.equal(lent.weight, whole.head.weight[list(kept)])  # type: ignore[union-attr,index]
    assert torch.equal(lent.bias, whole.head.bias[list(kept)])  # type: ignore[union-attr,index]


@pytest.mark.parametrize("head", ["init", "frozen"])
@pytest.mark.parametrize("name", ["cskd", "kd", "thkd", "kdeth", "crdth"])
def test_a_borrowed_classifier_is_the_cut_one(name: str, head: str) -> None:
    setup, whole = cut_setup(kept := SUBSETS[1])
    method = METHODS[name](setup, METHODS[name].Config(**tiny.QUICK.get(name, {}), head=head))
    assert torch.equal(method.student.head.weight, whole.head.weight[list(kept)])  # type: ignore[union-attr,index,arg-type]
    assert isinstance(method.student.head, FrozenLinear) == (head == "frozen")


def test_th_kd_on_a_subset_is_the_divergence_from_the_renormalised_teacher() -> None:
    setup, whole = cut_setup(kept := SUBSETS[0])
    method, batch = THKD(setup, THKD.Config(ce=0, kl=0, beta=1, T_head=3.0)), tiny.first_batch()
    s, t = setup.student.features(batch.images), teacher_features(setup.teacher, batch)
    assert t is not None
    z = whole.features(batch.images).logits[:, list(kept)].double()
    by_teacher = whole.head(s.embedding)[:, list(kept)].double()
    found = method.loss(s, t, batch._replace(labels=batch.labels % len(kept)))["knowledge"].raw
    torch.testing.assert_close(found.double(), kl_loops(by_teacher, z, 3.0), rtol=1e-5, atol=1e-7)


def test_th_kd_and_sim_kd_refuse_in_one_line_what_they_refuse_of_a_whole_teacher() -> None:
    setup, _ = cut_setup(SUBSETS[0], "resnet8x4")
    for name, part in (("thkd", "must be equally wide, got 64 and 256"), ("kdeth", "equally wide"), ("crdth", "equally wide")):
        with pytest.raises(UserError, match=part) as caught:
            METHODS[name](setup, METHODS[name].Config(**tiny.QUICK.get(name, {})))
        assert "\n" not in str(caught.value)
    METHODS["simkd"](setup, METHODS["simkd"].Config())


def two_heads() -> Net:
    return TwoHeads(build("resnet8", KNOWN), FrozenLinear.of(nn.Linear(64, KNOWN)), mix=0.4)


@pytest.mark.parametrize(
    ("make", "answer"),
    [
        (two_heads, lambda net, x: net(x)),
        (lambda: build("resnet32_gl", KNOWN), lambda net, x: net.branches(x).peers.transpose(1, 2)),
        (lambda: build("resnet32_gl", KNOWN), lambda net, x: net.branches(x).mixed.transpose(1, 2)),
    ],
    ids=["thkd's two", "peers", "peers mixed"],
)
def test_every_classifier_of_a_network_is_cut(make: Callable[[], Net], answer: Callable[[Any, Tensor], Tensor]) -> None:
    net, x = make().eval(), tiny.first_batch().images
    with torch.no_grad():
        whole, kept = answer(net, x), list(SUBSETS[0])
        cut(net, kept)
        found = answer(net, x)
    assert found.shape[-1] == len(kept)
    if not isinstance(net, TwoHeads):
        torch.testing.assert_close(found, whole[..., kept])
        return
    heads = (net.head, net.teacher_head)
    both = [head(net.features(x).embedding).softmax(1) for head in heads]  # type: ignore[operator]
    torch.testing.assert_close(found.exp(), 0.6 * both[0] + 0.4 * both[1])


def test_a_classifier_without_a_bias_or_with_normed_weights_is_cut_too() -> None:
    for head in (nn.Linear(64, KNOWN, bias=False), nn.utils.parametrizations.weight_norm(nn.Linear(64, KNOWN))):
        e = torch.randn(3, 64)
        torch.testing.assert_close(FrozenLinear.of(head, (3, 1))(e), head(e)[:, [3, 1]])


# --- through the stages -----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    monkeypatch.delenv("DVC_STAGE", raising=False)


METHODS_SHOWN = ["cskd", "kd", "thkd"]


def resolved(root: Path, **data: Any) -> Settings:
    """Settings for digits, which are prepared."""
    optim = {"epochs": 2, "batch_size": 16, "lr": 0.02, "schedule": "cosine"}
    small = {"image_size": 16, "train_images": 80, "val_images": 30, "test_images": 90}
    page: dict[str, Any] = {"teachers": ["resnet14"], "students": ["resnet8"], "methods": METHODS_SHOWN, "seeds": [0]}
    page |= {"device": "cpu", "optim": optim, "teacher": {"optim": optim}, "prepared": str(root / "data")}
    page |= {"data": small | data, "hp": {name: tiny.QUICK[name] for name in ("crd", "crdth")}}
    settings = config.resolve(settings_of.overlay(settings_of.defaults(), page))
    if not (root / "data").exists():
        prepare(settings.data, root / "data")
    return settings


def stage(settings: Settings, place: str, method: str | None = None, role: str = "student") -> None:
    """One stage, as dvc.yaml gives it its folders below the working folder."""
    here = replace(settings, out=f"out/models/{place}", record=f"out/records/{place}")
    if method is None:
        here = replace(here, train=settings_of.Train(role=role, seed=0))
        data = assemble.prepared(here)
        session.run([[assemble.single(here, data)]], data, here)
        return
    here = replace(here, distill=settings_of.Distill(method=method, seed=0))
    data = assemble.prepared(here)
    session.run([[assemble.distillation(here, data)]], data, here)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Path]:
    """Students know 1, 7 and 3; an untrained teacher knows six digits in another order."""
    root = tmp_path_factory.mktemp("cut")
    settings = resolved(root, classes=[1, 7, 3], teacher_classes=[7, 3, 9, 0, 1, 5])
    mine = replace(settings, train=settings_of.Train(role="teacher"))
    data = assemble.prepared(mine)
    job = assemble.single(mine, data)
    meta = job.meta | {key: data.manifest[key] for key in ("classes", "image_size", "mean", "std")}
    checkpoint.save(root / "teacher", job.method.student.state_dict(), meta)
    return replace(settings, distill=settings_of.Distill(checkpoint=str(root / "teacher"))), root


@pytest.mark.parametrize("name", METHODS)
def test_the_distill_stage_cuts_the_teacher_to_the_students_classes(ground: tuple[Settings, Path], name: str) -> None:
    settings, root = ground
    mine = replace(settings, distill=replace(settings.distill, method=name))
    data = assemble.prepared(mine)
    job = assemble.distillation(mine, data)
    assert data.manifest["classes"] == ["1", "7", "3"]
    assert job.meta["teacher"]["cut"] == {"kept": [4, 0, 1], "of": 6}
    assert job.params["teacher_outputs"] == "3 of 6"
    whole, meta = checkpoint.load(root / "teacher")
    assert meta["classes"] == ["7", "3", "9", "0", "1", "5"]
    assert job.teacher is not None
    batch = next(iter(feeds.loaders(data, 16, 0, torch.device("cpu"), two_views=True).train.epoch(1)))
    t = teacher_features(job.teacher, batch)
    assert t is not None
    torch.testing.assert_close(t.logits, whole(batch.images)[:, [4, 0, 1]])
    assert probe(job.method.student, 16).logits.shape[1] == 3


OWN = """
from torch import nn
from pupil.models import build

def layers(classes):
    net = build("resnet8", classes)
    net.name = "layers"
    net.head = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, classes))
    return net
"""


def test_a_teacher_without_a_linear_classifier_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    network = f"{tmp_path}/mine.py:layers"
    for folder, data in (("some", {"classes": [1, 7], "teacher_classes": [3, 1, 7]}), ("all", {})):
        settings = replace(resolved(tmp_path / folder, **data), teachers=(network,))
        mine = replace(settings, train=settings_of.Train(role="teacher"))
        prepared = assemble.prepared(mine)
        job = assemble.single(mine, prepared)
        meta = job.meta | {key: prepared.manifest[key] for key in ("classes", "image_size", "mean", "std")}
        checkpoint.save(tmp_path / folder / "teacher", job.method.student.state_dict(), meta)
        prepared = assemble.prepared(settings)
        for name in ("kd", "thkd", "simkd", "srrl"):
            cell = settings_of.Distill(method=name, checkpoint=str(tmp_path / folder / "teacher"))
            if (folder, name) == ("all", "kd"):
                assemble.distillation(replace(settings, distill=cell), prepared)
                continue
            with pytest.raises(UserError, match=r"^a classifier that is a Sequential can be neither lent nor cut") as caught:
                assemble.distillation(replace(settings, distill=cell), prepared)
            assert "\n" not in str(caught.value)


def accuracies(logits: Tensor, labels: Tensor, names: list[str]) -> dict[str, float]:
    right = logits.argmax(1) == labels
    return {name: 100 * right[labels == k].double().mean().item() for k, name in enumerate(names)}


def test_the_comparison_shows_the_cut_teacher_the_baseline_and_the_students_class_by_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each stage by itself, then the evaluation of what they left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rows, "cost", lambda net, size: dict.fromkeys(report.COSTS, float(probe(net, size).logits.shape[1])))
    settings = resolved(tmp_path, classes=[3, 8, 1], teacher_classes="all")
    stage(settings, "teacher/resnet14", role="teacher")
    stage(settings, "student/resnet8/0")
    for name in METHODS_SHOWN:
        stage(settings, f"distill/resnet14-resnet8/{name}/0", name)
    capsys.readouterr()
    report.write(replace(settings, record="out/records/evaluate"), tmp_path / "reports")
    networks = {n["family"]: n for n in json.loads((tmp_path / "reports/networks.json").read_text())}
    students = ["resnet8 alone", *(f"resnet8 by {name} from resnet14" for name in METHODS_SHOWN)]
    assert list(networks) == ["resnet14", "resnet14 cut to 3 classes", *students]

    data = assemble.prepared(settings)
    test = feeds.loaders(data, 16, 0, torch.device("cpu")).test
    whole, meta = checkpoint.load(Path("out/models/teacher/resnet14"))
    assert meta["classes"] == [str(k) for k in range(10)]
    logits, labels = predict(whole, test)
    wanted = {"resnet14 cut to 3 classes": logits[:, [3, 8, 1]]}
    folders = ["student/resnet8/0", *(f"distill/resnet14-resnet8/{name}/0" for name in METHODS_SHOWN)]
    for family, folder in zip(students, folders, strict=True):
        net, meta = checkpoint.load(Path("out/models") / folder)
        wanted[family], _ = predict(net, test)
        saved = load_file(Path("out/models") / folder / session.PREDICTIONS)
        torch.testing.assert_close(saved["deployed"], wanted[family])
        assert ("teacher" in saved) == (family != "resnet8 alone")
    for family, z in wanted.items():
        assert networks[family]["per_class"] == pytest.approx(accuracies(z, labels, ["3", "8", "1"]))
        assert networks[family]["top1"] == pytest.approx(100 * (z.argmax(1) == labels).double().mean().item())
    teacher = wanted["resnet14 cut to 3 classes"].argmax(1)
    for family in students[1:]:
        same = 100 * (wanted[family].argmax(1) == teacher).double().mean().item()
        assert networks[family]["agreement"] == pytest.approx(same)
    assert networks["resnet14 cut to 3 classes"]["parameters"] == 3, "the cost of the cut network"
    assert networks["resnet14"]["parameters"] == 10
    assert len(networks["resnet14"]["per_class"]) == 10

    out = capsys.readouterr().out
    assert out.strip() == (tmp_path / "reports/table.md").read_text().strip()
    tables = out.strip().split("\n\n")
    assert "| resnet14 [10 classes: 0, 1, 2, 3, 4, ...] " in tables[0]
    assert "| resnet14 cut to 3 classes " in tables[0]
    assert "cut to classes: of the same teacher" in tables[1]
    head, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables[2].splitlines()]
    assert head == ["accuracy in %", "resnet14 cut to 3 classes", *students]
    assert [line[0] for line in lines] == ["3", "8", "1"]
    for line in lines:
        assert line[1:] == [f"{networks[family]['per_class'][line[0]]:.1f}" for family in head[1:]]
    record = json.loads(Path("out/records/distill/resnet14-resnet8/cskd/0/record.json").read_text())
    assert record["final"]["test/teacher/top1"] == pytest.approx(networks["resnet14 cut to 3 classes"]["top1"])
    final = json.loads(Path("out/records/evaluate/record.json").read_text())["final"]
    assert final["resnet14 cut to 3 classes/top1_mean"] == pytest.approx(networks["resnet14 cut to 3 classes"]["top1"])
    assert all(math.isfinite(value) for value in final.values())


def test_without_a_subset_there_is_no_such_row_and_no_table_of_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rows, "cost", lambda net, size: dict.fromkeys(report.COSTS, 1.0))
    settings = replace(resolved(tmp_path, classes=[3, 8, 1]), methods=("cskd",))
    stage(settings, "teacher/resnet14", role="teacher")
    stage(settings, "student/resnet8/0")
    stage(settings, "distill/resnet14-resnet8/cskd/0", "cskd")
    assert "teacher" not in load_file(Path("out/models/distill/resnet14-resnet8/cskd/0") / session.PREDICTIONS)
    capsys.readouterr()
    report.write(replace(settings, record="out/records/evaluate"), tmp_path / "reports")
    out = capsys.readouterr().out
    assert "cut to" not in out
    assert "accuracy in %" not in out


def test_merged_classes_take_the_outputs_of_the_classes_that_their_labels_stand_for(tmp_path: Path) -> None:
    """CSKD's own numbering of five classes of ten; label 4 has the images of 7 and 3, and the authors' code reads output 3."""
    settings = resolved(tmp_path, classes=5, teacher_classes="all", relabel="cskd")
    mine = replace(settings, train=settings_of.Train(role="teacher"))
    data = assemble.prepared(mine)
    job = assemble.single(mine, data)
    meta = job.meta | {key: data.manifest[key] for key in ("classes", "image_size", "mean", "std")}
    checkpoint.save(tmp_path / "teacher", job.method.student.state_dict(), meta)
    cell = settings_of.Distill(method="cskd", checkpoint=str(tmp_path / "teacher"))
    ours = assemble.prepared(settings)
    job = assemble.distillation(replace(settings, distill=cell), ours)
    assert job.meta["teacher"]["cut"]["kept"] == [4, 6, 2, 7, 3]
    assert ours.splits["train"][1].unique().tolist() == [0, 1, 2, 4]
