"""Which classes and which images: subsets, labels, teachers with classes of their own, and draws of every kind."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor

from pupil import assemble, checkpoint, config, report, rows
from pupil import settings as settings_of
from pupil.data import Data, load, prepare
from pupil.data.base import Content, in_memory
from pupil.data.classes import class_sets, in_place_labels, labelling
from pupil.data.draw import Drawn, draw
from pupil.methods import METHODS
from pupil.models import build
from pupil.net import probe
from pupil.places import PREDICTIONS
from pupil.types import UserError
from tests import tiny
from tests.test_sources import GREY, as_folder, as_zip
from tests.test_sources import tiny_imagenet as tiny_imagenet_files

SPLITS = ("train", "val", "test")
QUICK = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


def names(n: int) -> tuple[str, ...]:
    return tuple(map(str, range(n)))


def told(config: Data, out: Path) -> str:
    with pytest.raises(UserError) as caught:
        prepare(config, out)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    return str(caught.value)


# --- draws ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Try:
    content: Content
    config: Data
    chosen: list[int]

    @property
    def drawn(self) -> dict[str, Drawn]:
        return draw(self.config, self.content, self.chosen)

    def labels(self, part: Drawn) -> Tensor:
        pool = {"train": self.content.train, "val": self.content.val, "test": self.content.test}[part.home]
        assert pool is not None
        return pool.labels[part.ids]


@st.composite
def tries(draws: st.DrawFn, kind: str = "any") -> Try:
    """A source of a few classes of uneven size and settings for it; such as cannot be met are left out."""
    classes = draws(st.integers(2, 5))
    shuffle = torch.Generator().manual_seed(draws(st.integers(0, 9)))

    def pool(least: int, most: int) -> Any:
        counts = draws(st.lists(st.integers(least, most), min_size=classes, max_size=classes))
        labels = torch.arange(classes).repeat_interleave(torch.tensor(counts))[torch.randperm(sum(counts), generator=shuffle)]
        return in_memory(torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8), labels, 8)

    own_val = kind != "folds" and draws(st.booleans())
    content = Content(
        names(classes), pool(8, 40), pool(1, 9) if own_val else None, pool(1, 9) if draws(st.booleans()) else None
    )
    config = Data(seed=draws(st.integers(0, 5)))
    if kind == "folds" or (kind == "any" and not own_val and draws(st.booleans())):
        folds = draws(st.integers(2, 5))
        config = replace(config, folds=folds, fold=draws(st.integers(0, folds - 1)))
    elif not own_val:
        config = replace(config, val_images=draws(st.none() | st.integers(classes, 20)))
    amount = draws(st.sampled_from(["all", "number", "low-shot"]))
    if amount == "low-shot":
        config = replace(config, per_class=draws(st.integers(1, 6)))
    elif amount == "number":
        config = replace(config, train_images=draws(st.integers(classes, 40)))
    chosen = draws(st.permutations(range(classes)))[: draws(st.integers(2, classes))]
    made = Try(content, config, chosen)
    assume(possible(made))
    return made


def possible(made: Try) -> bool:
    try:
        for fold in range(made.config.folds or 1):
            draw(replace(made.config, fold=fold), made.content, made.chosen)
    except UserError:
        return False
    return True


@QUICK
@given(tries())
def test_a_draw_is_disjoint_repeatable_and_has_every_class_and_no_other_in_every_split(made: Try) -> None:
    drawn, again = made.drawn, made.drawn
    used: set[tuple[str, int]] = set()
    for name in SPLITS:
        part = drawn[name]
        assert torch.equal(part.ids, again[name].ids)
        assert part.ids.tolist() == sorted(set(part.ids.tolist()))
        assert set(made.labels(part).tolist()) == set(made.chosen)
        mine = {(part.home, i) for i in part.ids.tolist()}
        assert not used & mine
        used |= mine
    if made.config.per_class is not None:
        counts = made.labels(drawn["train"]).bincount()[made.chosen].tolist()
        assert counts == [made.config.per_class] * len(made.chosen)
    elif made.config.train_images is not None:
        assert len(drawn["train"].ids) == made.config.train_images
    else:
        members = torch.isin(made.content.train.labels, torch.tensor(made.chosen)).sum()
        assert sum(len(part.ids) for part in drawn.values() if part.home == "train") == members, "complete"


@QUICK
@given(tries("plain"))
def test_the_splits_have_the_classes_in_proportion(made: Try) -> None:
    """Within one image per split that was taken before, where every class can give its share."""
    assume(made.config.per_class is None)
    drawn = made.drawn
    counts = made.content.train.labels.bincount()[made.chosen].double()
    shares = {n: len(d.ids) * counts / counts.sum() for n, d in drawn.items() if d.home == "train"}
    assume(min(share.min().item() for share in shares.values()) >= 3)
    for name, share in shares.items():
        found = made.labels(drawn[name]).bincount(minlength=len(made.content.classes))[made.chosen]
        assert (found - share).abs().max() <= len(shares), name


@QUICK
@given(tries("folds"))
def test_each_image_is_validated_in_one_fold_whatever_is_left_of_the_training_images(made: Try) -> None:
    assert made.config.folds is not None
    parts = [draw(replace(made.config, fold=k), made.content, made.chosen) for k in range(made.config.folds)]
    assert all(torch.equal(p["test"].ids, parts[0]["test"].ids) for p in parts)
    validated = [i for p in parts for i in p["val"].ids.tolist()]
    assert len(validated) == len(set(validated))
    assert all(set(p["train"].ids.tolist()) <= set(validated) - set(p["val"].ids.tolist()) for p in parts)


@QUICK
@given(tries("plain"), st.integers(6, 99))
def test_another_seed_draws_other_images(made: Try, seed: int) -> None:
    """Of 20 images or more, half or fewer of them: two equal draws are as good as impossible."""
    part = made.drawn["train"]
    members = torch.isin(made.content.train.labels, torch.tensor(made.chosen)).sum()
    assume(20 <= 2 * len(part.ids) <= members)
    assert not torch.equal(part.ids, draw(replace(made.config, seed=seed), made.content, made.chosen)["train"].ids)


def test_few_images_of_each_class_go_with_folds(tmp_path: Path) -> None:
    manifest = prepare(Data(image_size=8, per_class=7, folds=5, fold=4), tmp_path / "out")
    assert manifest["class_counts"]["train"] == [7] * 10
    assert "fold 1 leaves" in told(Data(image_size=8, per_class=116, folds=5, fold=1), tmp_path / "none")


# --- labels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(  # ../shared/reference/methods.md 6.5, the authors' lines run on their own permutation
    ("of", "n", "left"),
    [
        (10, 5, 4),
        (10, 8, 6),
        (10, 10, 7),
        (100, 14, 14),
        (100, 15, 14),
        (100, 20, 16),
        (100, 50, 35),
        (200, 30, 29),
        (200, 50, 45),
    ],
)
def test_renumbering_in_place_merges_as_many_classes_as_in_cskd_s_code(of: int, n: int, left: int) -> None:
    assert len(set(in_place_labels(class_sets(Data(classes=n), names(of)).student))) == left


@given(st.permutations(range(12)), st.integers(2, 12))
def test_renumbering_in_place_is_what_assigning_in_an_array_gives(order: list[int], n: int) -> None:
    targets = torch.tensor(order[:n])
    for label, k in enumerate(order[:n]):
        targets[targets == k] = label
    assert in_place_labels(order[:n]) == targets.tolist()


def test_merged_classes_are_called_so_and_only_the_labels_differ(tmp_path: Path) -> None:
    """CSKD's example: of five classes of ten, 7 ends up with 3, and label 3 has no image."""
    right, cskd = Data(image_size=8, classes=5), Data(image_size=8, classes=5, relabel="cskd")
    manifest = prepare(cskd, tmp_path / "cskd")
    assert manifest["classes"] == ["4", "6", "2", "(no class, label 3)", "7 + 3"]
    assert all(counts[3] == 0 < min(counts[:3]) for counts in manifest["class_counts"].values())
    prepare(right, tmp_path / "right")
    merge = torch.tensor([0, 1, 2, 4, 4])
    for name in SPLITS:
        a, b = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("right", "cskd"))
        assert torch.equal(a["images"], b["images"])
        assert torch.equal(merge[a["labels"]], b["labels"])


def test_labels_are_the_order_of_the_classes() -> None:
    sets = class_sets(Data(classes=("7", 2, "4")), names(10))
    assert labelling(sets.student, sets, names(10)).labels.tolist() == [0, 1, 2]
    assert labelling(sets.student, sets, names(10)).names == ["7", "2", "4"]


# --- teachers with classes of their own -----------------------------------------------------------------------------------


@given(st.integers(4, 300), st.integers(0, 100))
def test_an_overlap_shares_so_many_classes_and_the_rest_are_the_two_halves(of: int, percent: int) -> None:
    second = of - of // 2
    shared = percent * second // 100
    assume(shared <= of // 2)
    sets = class_sets(Data(overlap=percent / 100), names(of))
    assert sets.teacher == list(range(of // 2))
    assert sets.student == [*range(shared), *range(of // 2 + shared, of)]
    assert len(set(sets.student) & set(sets.teacher)) == shared


APART: list[dict[str, Any]] = [
    {"classes": (0, 1, 2, 3, 4), "teacher_classes": (8, 3, 4, 5)},
    {"classes": 5, "teacher_classes": "all", "relabel": "cskd"},
    {"overlap": 0.4},
    {"overlap": 0.0, "folds": 4, "fold": 1, "per_class": 9},
    {"teacher_classes": 3, "train_images": 120, "val_images": 60},
]


@pytest.mark.parametrize("change", APART, ids=str)
def test_both_sets_are_cut_from_one_draw(tmp_path: Path, change: dict[str, Any]) -> None:
    """What the teacher learns from is not what the student is judged by."""
    config = Data(image_size=8, **change)
    manifest = prepare(config, tmp_path / "out")
    student, teacher = load(tmp_path / "out"), load(tmp_path / "out" / "teacher")
    sets = class_sets(config, names(10))
    assert teacher.manifest["classes"] == [str(k) for k in sets.teacher] == manifest["teacher_classes"]
    assert (student.manifest["mean"], student.manifest["std"]) == (teacher.manifest["mean"], teacher.manifest["std"])
    where: dict[int, str] = {}
    shared = 0
    embedded: Any = load_digits()
    digit = torch.tensor(embedded.target)
    merged = torch.tensor(in_place_labels(sets.student) if config.relabel == "cskd" else range(len(sets.student)))
    for name in SPLITS:
        ours, theirs = (load_file(tmp_path / "out" / f / f"{name}.safetensors") for f in ("", "teacher"))
        at = {i: k for k, i in enumerate(ours["source_ids"].tolist())}
        assert digit[theirs["source_ids"]].tolist() == [sets.teacher[label] for label in theirs["labels"]]
        places = [sets.student.index(k) for k in digit[ours["source_ids"]].tolist()]
        assert torch.equal(ours["labels"], merged[places])
        both = [(at[i], k) for k, i in enumerate(theirs["source_ids"].tolist()) if i in at]
        for a, b in both:
            assert torch.equal(ours["images"][a], theirs["images"][b])
        shared += len(both)
        for part in (ours, theirs):
            for i in part["source_ids"].tolist():
                assert where.setdefault(i, name) == name, "one image, one split"
    assert (shared > 0) == bool(set(sets.student) & set(sets.teacher))


def test_without_other_classes_there_is_one_folder(tmp_path: Path) -> None:
    same: list[dict[str, Any]] = [{}, {"overlap": 1.0}, {"classes": 4, "teacher_classes": 4}]
    for change in same:
        manifest = prepare(Data(image_size=8, **change), tmp_path / "out")
        assert manifest["teacher_classes"] is None
        assert not (tmp_path / "out" / "teacher").exists()


CROSSING = [name for name, method in METHODS.items() if not method.needs_same_classes and not method.Config().kl]


@pytest.mark.parametrize("name", CROSSING)
def test_a_method_that_says_so_learns_from_a_teacher_of_other_classes(name: str) -> None:
    teacher = build(tiny.TEACHERS[0], tiny.CLASSES + 3).requires_grad_(False).eval()
    method = METHODS[name](
        replace(tiny.setup(), teacher=teacher, t=probe(teacher, tiny.SIZE)),
        METHODS[name].Config(**tiny.QUICK.get(name, {})),
    )
    tiny.train(method, teacher, 1)
    assert probe(method.student, tiny.SIZE).logits.shape[1] == tiny.CLASSES


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> tuple[config.Settings, Path]:
    """Digits: students know 0 to 4, teachers 3 to 8; an untrained teacher of them."""
    root = tmp_path_factory.mktemp("apart")
    data = Data(image_size=16, classes=(0, 1, 2, 3, 4), teacher_classes=(3, 4, 5, 6, 7, 8), train_images=90, val_images=30)
    prepare(data, root / "data")
    page = {"prepared": str(root / "data"), "teachers": ["resnet8"], "data": settings_of.plain(data)}
    found = config.resolve(settings_of.overlay(settings_of.defaults(), page))
    job = assemble.single(mine := replace(found, train=settings_of.Train(role="teacher")), prepared := assemble.prepared(mine))
    assert prepared.manifest["classes"] == ["3", "4", "5", "6", "7", "8"]
    keep(root / "teacher", job.method.student, prepared, job.meta)
    return replace(found, distill=settings_of.Distill(checkpoint=str(root / "teacher"))), root


def keep(folder: Path, net: Any, data: assemble.Prepared, meta: dict[str, Any]) -> None:
    """A model folder, with made-up predictions that are all right."""
    facts = {key: data.manifest[key] for key in ("classes", "image_size", "mean", "std")}
    checkpoint.save(folder, net.state_dict(), {**meta, **facts, "epoch": 0, "selection": "last"})
    labels = data.splits["test"][1]
    logits = torch.eye(len(facts["classes"]))[labels]
    checkpoint.save_arrays(
        folder / PREDICTIONS,
        {"labels": labels, **{name: logits.clone() for name in ("deployed", "last", "best_by_val")}},
    )


@pytest.mark.parametrize("name", METHODS)
def test_the_distill_stage_takes_such_a_teacher_or_refuses_it_in_one_line(
    apart: tuple[config.Settings, Path], name: str
) -> None:
    found, _ = apart
    mine = replace(found, distill=replace(found.distill, method=name))
    data = assemble.prepared(mine)
    if name in CROSSING:
        job = assemble.distillation(mine, data)
        assert assemble.probe(job.method.student, 16).logits.shape[1] == 5
        mine = replace(mine, hp={**mine.hp, name: replace(mine.hp[name], kl=1.0)})
    with pytest.raises(UserError, match=rf"{name}.* needs a teacher of the student's classes") as caught:
        assemble.distillation(mine, data)
    assert "\n" not in str(caught.value)


def test_the_comparison_names_the_teacher_s_own_classes(
    apart: tuple[config.Settings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, root = apart
    data = assemble.prepared(found)
    job = assemble.distillation(replace(found, distill=replace(found.distill, method="crd")), data)
    keep(tmp_path / "taught", job.method.student, data, job.meta)
    keep(tmp_path / "alone", job.method.student, data, job.meta | {"method": None, "surgery": {}})
    places = [("resnet8", None, None, root / "teacher"), ("resnet8 alone", None, None, tmp_path / "alone")]
    places += [("resnet8 by crd", "resnet8 alone", root / "teacher", tmp_path / "taught")]
    costs = dict.fromkeys(report.COSTS, 1.0)
    monkeypatch.setattr(rows, "cost", lambda net, size: costs)
    networks = rows.describe_all([rows.Cell(family, base, t, 0, folder) for family, base, t, folder in places])
    assert all("agreement" not in n for n in networks), "answers about other images agree with nothing"
    text = report.table(report.summarise(networks), report.other_classes(networks))
    assert "| resnet8 [6 classes: 3, 4, 5, 6, 7, ...] |" in text
    assert "| resnet8 alone " in text
    assert "not to be compared" in text
    assert "not to be compared" not in report.table(report.summarise(networks[1:]), report.other_classes(networks[1:]))
    assert json.dumps(networks, allow_nan=False)


# --- Tiny-ImageNet's halves -------------------------------------------------------------------------------------------------


def tiny_files() -> dict[str, bytes]:
    """Four images of each class in `val`, whose brightness says which one it is; listed from the last to the first."""
    files = {name: raw for name, raw in tiny_imagenet_files().items() if not name.startswith("val/")}
    rows = [(k, i) for i in reversed(range(4)) for k in range(200)]
    files |= {f"val/images/val_{i}_{k:03}.JPEG": GREY[40 * i] for k, i in rows}
    lines = "".join(f"val_{i}_{k:03}.JPEG\tn{k:08}\t0\t0\t63\t63\n" for k, i in rows)
    return files | {"val/val_annotations.txt": lines.encode()}


def grey(out: Path, split: str, label: int) -> list[int]:
    images, labels = load(out).splits[split]
    return sorted(images[labels == label][:, 0, 4, 4].tolist())


def test_cskd_s_halves_of_tiny_imagenet_go_by_name_whatever_the_order_of_the_list(tmp_path: Path) -> None:
    digests = set()
    for pack in (as_folder, as_zip):
        config = Data(name="tiny_imagenet_cskd", path=str(pack(tiny_files(), tmp_path / "in")), image_size=8)
        manifest = prepare(config, tmp_path / "out")
        assert manifest["counts"] == {"train": 400, "val": 400, "test": 400}
        assert manifest["source_splits"] == {"train": "train", "val": "val", "test": "test"}
        for label in (0, 7, 199):
            assert grey(tmp_path / "out", "val", label) == [0, 40]
            assert grey(tmp_path / "out", "test", label) == [80, 120]
        digests.add(manifest["digest"])
    assert len(digests) == 1


def test_cskd_s_halves_in_the_order_of_the_folder_s_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = as_folder(tiny_files(), tmp_path / "in")
    as_listed = Path.iterdir

    def backwards(path: Path) -> Any:
        return iter(sorted(as_listed(path), reverse=True))

    monkeypatch.setattr(Path, "iterdir", backwards)
    config = Data(name="tiny_imagenet_cskd_glob", path=str(root), image_size=8)
    prepare(config, tmp_path / "out")
    assert grey(tmp_path / "out", "val", 3) == [80, 120]
    assert grey(tmp_path / "out", "test", 3) == [0, 40]
    archive = as_zip(tiny_files(), tmp_path / "in")
    assert "use tiny_imagenet_cskd" in told(replace(config, path=str(archive)), tmp_path / "none")


# --- what cannot be ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"relabel": "wrong", "classes": 5}, "data.relabel is 'wrong': right, or cskd"),
        ({"relabel": "cskd"}, "data.relabel=cskd renumbers the classes of data.classes, which is not given"),
        ({"relabel": "cskd", "classes": (1, 0)}, "gives the classes 1, 0 one and the same label"),
        ({"teacher_classes": ()}, "data.teacher_classes is []: 2 classes or more"),
        ({"classes": (), "teacher_classes": ()}, "data.classes is []: 2 classes or more"),
        ({"teacher_classes": 1}, "data.teacher_classes is 1: a number of classes is from 2 to 10"),
        ({"teacher_classes": "al"}, "data.teacher_classes is 'al': all, a number, or a list"),
        ({"teacher_classes": (3, 12)}, "data.teacher_classes: class 12 of 10"),
        ({"teacher_classes": (3, "thre")}, "data.teacher_classes: there is no class 'thre'"),
        ({"overlap": 1.5}, "data.overlap is 1.5: the share"),
        ({"overlap": -0.1}, "data.overlap is -0.1: the share"),
        ({"overlap": 0.5, "classes": 5}, "data.overlap and data.classes are both given"),
        ({"overlap": 0.5, "teacher_classes": "all"}, "data.overlap and data.teacher_classes are both given"),
        ({"per_class": 500}, "are needed; add images"),
    ],
)
def test_impossible_settings_are_told_in_one_line(tmp_path: Path, change: dict[str, Any], part: str) -> None:
    assert part in told(Data(image_size=8, **change), tmp_path / "out")


def test_an_overlap_larger_than_the_teachers_half_is_refused() -> None:
    with pytest.raises(UserError, match=r"34 shared classes, the teachers' half of 67 has 33; 0\.97 is the most"):
        class_sets(Data(overlap=1.0), names(67))
    assert class_sets(Data(overlap=0.97), names(67)).student[:32] == list(range(32))
    with pytest.raises(UserError, match="halves of 3 classes are too small"):
        class_sets(Data(overlap=0.5), names(3))
