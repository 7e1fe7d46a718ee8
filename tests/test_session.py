"""A stage run twice leaves the same bytes; a seed gives every method the same student and the same batches; the test
images are read when the training is over."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pupil import assemble, checkpoint, config, feeds, record, session, tracking
from pupil import settings as settings_of
from pupil.data import Prepared, prepare
from pupil.data.resident import Resident
from pupil.methods import METHODS
from pupil.net import FrozenLinear
from pupil.settings import Settings
from pupil.types import UserError
from tests import tiny

FILES = (checkpoint.WEIGHTS, checkpoint.META, session.PREDICTIONS)
OF_THE_MOMENT = ("images_per_second", "system/")  # not functions of the training


@pytest.fixture(autouse=True)
def _without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    monkeypatch.delenv("DVC_STAGE", raising=False)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Prepared]:
    """Settings, prepared digits, and a teacher's folder."""
    root = tmp_path_factory.mktemp("ground")
    optim = {"epochs": 2, "batch_size": 16, "lr": 0.02, "schedule": "cosine"}
    page: dict[str, Any] = {"teachers": ["resnet14"], "device": "cpu", "optim": optim, "teacher": {"optim": optim}}
    page["data"] = {"train_images": 40, "val_images": 10, "test_images": 20, "image_size": 16, "pad": 2, "flip": True}
    page |= {
        "hp": {"crd": {"k": 16, "dim": 8}},
        "prepared": str(root / "data"),
        "distill": {"checkpoint": str(root / "teacher")},
    }
    settings = config.resolve(settings_of.overlay(settings_of.defaults(), page))
    prepare(settings.data, root / "data")
    data = assemble.prepared(settings)
    torch.manual_seed(0)
    job = assemble.single(dataclasses.replace(settings, train=settings_of.Train(role="teacher")), data)
    meta = {**job.meta, **{key: data.manifest[key] for key in ("classes", "image_size", "mean", "std")}}
    checkpoint.save(root / "teacher", job.method.student.state_dict(), meta)
    return settings, data


def at(settings: Settings, folder: Path, method: str | None, seed: int) -> Settings:
    """One cell of the matrix, below `folder`; no method: the student alone."""
    changed = dataclasses.replace(settings, out=str(folder / "model"), record=str(folder / "record"))
    if method is None:
        return dataclasses.replace(changed, train=settings_of.Train(network="resnet8", seed=seed))
    cell = dataclasses.replace(settings.distill, student="resnet8", method=method, seed=seed)
    return dataclasses.replace(changed, distill=cell)


def run(ground: tuple[Settings, Prepared], folder: Path, method: str | None, seed: int, disturb: int) -> dict[str, Any]:
    """The bytes and the numbers that a stage leaves; `disturb`: the state in which the generator is found."""
    settings, data = ground
    here = at(settings, folder, method, seed)
    torch.manual_seed(disturb)
    torch.rand(disturb)
    job = assemble.single(here, data) if method is None else assemble.distillation(here, data)
    session.run([[job]], data, here)
    found: dict[str, Any] = {name: (folder / "model" / name).read_bytes() for name in FILES}
    lines = record.read_metrics(folder / "record")
    found["lines"] = [{k: v for k, v in line["values"].items() if not k.startswith(OF_THE_MOMENT)} for line in lines]
    facts = record.read(folder / "record")
    return found | {key: facts[key] for key in ("final", "outputs", "inputs", "params", "seeds")}


@pytest.mark.parametrize("method", [None, "simkd", "crd"])
def test_the_same_seed_leaves_the_same_bytes_and_numbers(
    method: str | None, ground: tuple[Settings, Prepared], tmp_path: Path
) -> None:
    first, again = (run(ground, tmp_path / str(i), method, seed=0, disturb=i) for i in (1, 2))
    assert first == again
    assert len(first["lines"]) == 2
    said = json.loads(first[checkpoint.META])["metrics"]
    assert said == {"test/images": 20, **{name: first["final"][name] for name in ("test/top1", "test/nll")}}


@pytest.mark.parametrize("method", [None, "kd"])
def test_another_seed_leaves_other_weights_and_predictions(
    method: str | None, ground: tuple[Settings, Prepared], tmp_path: Path
) -> None:
    first, other = (run(ground, tmp_path / str(seed), method, seed, disturb=0) for seed in (0, 1))
    assert first[checkpoint.WEIGHTS] != other[checkpoint.WEIGHTS]
    assert first[session.PREDICTIONS] != other[session.PREDICTIONS]
    assert first["inputs"] == other["inputs"]


@pytest.mark.parametrize("method", list(METHODS))
def test_a_method_starts_from_the_student_that_is_trained_alone(
    method: str, ground: tuple[Settings, Prepared], tmp_path: Path
) -> None:
    settings, data = ground
    for seed in (0, 1):
        alone = assemble.single(at(settings, tmp_path, None, seed), data)
        taught = assemble.distillation(at(settings, tmp_path, method, seed), data)
        assert (alone.seed, alone.optim) == (taught.seed, taught.optim)
        ours, theirs = tiny.state(taught.method.student), tiny.state(alone.method.student)
        borrowed = isinstance(taught.method.student.head, FrozenLinear)
        kept = [key for key in theirs if not (borrowed and key.startswith("head."))]
        assert len(kept) > 30
        assert all(torch.equal(ours[key], theirs[key]) for key in kept)


def test_the_student_alone_sees_the_views_that_the_taught_one_sees(ground: tuple[Settings, Prepared], tmp_path: Path) -> None:
    settings, data = ground
    few = dataclasses.replace(settings, views=2)
    alone = assemble.single(at(few, tmp_path, None, 0), data)
    taught = assemble.distillation(at(few, tmp_path, "kd", 0), data)
    assert (alone.views, taught.views) == (2, 2)
    assert assemble.single(dataclasses.replace(few, train=settings_of.Train(role="teacher")), data).views is None
    shown = feeds.loaders(data, 16, 0, torch.device("cpu"), views=2).train
    first, second, third = (
        {i: x for b in shown.epoch(n) for i, x in zip(b.ids.tolist(), b.images, strict=True)} for n in (1, 2, 3)
    )
    assert all(torch.equal(first[i], third[i]) for i in first)
    assert not all(torch.equal(first[i], second[i]) for i in first)


def test_a_seed_gives_the_same_batches_whatever_is_trained(ground: tuple[Settings, Prepared]) -> None:
    _, data = ground
    torch.manual_seed(1)
    a = feeds.loaders(data, 16, 0, torch.device("cpu")).train
    torch.manual_seed(2)
    b = feeds.loaders(data, 16, 0, torch.device("cpu")).train
    other = feeds.loaders(data, 16, 1, torch.device("cpu")).train
    for x, y, z in zip(a.epoch(3), b.epoch(3), other.epoch(3), strict=True):
        assert torch.equal(x.ids, y.ids)
        assert torch.equal(x.images, y.images)
        assert not torch.equal(x.ids, z.ids)


def test_the_random_streams_of_one_seed_are_independent() -> None:
    drawn = set()
    for stream in ("network", "method", "training"):
        for seed in range(20):
            assemble.seed_everything(stream, seed)
            drawn.add(torch.rand(1, dtype=torch.float64).item())
    assert len(drawn) == 60


class Counted(Resident):
    """A loader that counts how often its images are read."""

    reads = 0

    def epoch(self, number: int, first: int = 0) -> Any:
        self.reads += 1
        return super().epoch(number, first)


def counted_run(
    ground: tuple[Settings, Prepared], folder: Path, monkeypatch: pytest.MonkeyPatch, papers: bool
) -> tuple[list[int], dict[str, Any]]:
    """Readings of the test split before fit, after fit and in all; the record's final metrics and all metric names."""
    settings, data = ground
    here = dataclasses.replace(
        at(settings, folder, None, 0), protocol=settings_of.Protocol(deploy="best_by_val", papers_best_on_test=papers)
    )
    counts: list[int] = []
    build, fit = feeds.loaders, session.fit
    m = data.manifest
    test = Counted(*data.splits["test"], m["mean"], m["std"], 256, torch.device("cpu"))

    def spied_fit(*args: Any) -> Any:
        counts.append(test.reads)
        trained = fit(*args)
        counts.append(test.reads)
        return trained

    with monkeypatch.context() as patch:
        patch.setattr(session, "loaders", lambda *args: build(*args)._replace(test=test))
        patch.setattr(session, "fit", spied_fit)
        session.run([[assemble.single(here, data)]], data, here)
    names = {name for line in record.read_metrics(folder / "record") for name in line["values"]}
    return [*counts, test.reads], {"final": record.read(folder / "record")["final"], "names": names}


def test_the_test_images_are_read_only_when_the_training_is_over(
    ground: tuple[Settings, Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, found = counted_run(ground, tmp_path / "honest", monkeypatch, papers=False)
    assert counts[:2] == [0, 0]
    assert counts[2] in (1, 2), "once for the last epoch's weights, once for the best by validation if they differ"
    assert {"test/top1", "test/last/top1", "test/best_by_val/top1"} <= found["final"].keys()
    assert found["final"]["test/top1"] == found["final"]["test/best_by_val/top1"]
    assert not any("papers" in name for name in (*found["final"], *found["names"]))


def test_the_papers_protocol_has_names_of_its_own_and_leaves_the_training_as_it_is(
    ground: tuple[Settings, Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, honest = counted_run(ground, tmp_path / "honest", monkeypatch, papers=False)
    counts, found = counted_run(ground, tmp_path / "papers", monkeypatch, papers=True)
    assert counts[1] == ground[0].optim.epochs, "after each epoch"
    assert "papers_protocol/test_top1" in found["names"]
    best = found["final"].pop("papers_protocol/best_on_test/top1")
    assert best >= found["final"]["test/last/top1"]
    assert found["final"] == honest["final"]
    same = [(tmp_path / name / "model" / checkpoint.WEIGHTS).read_bytes() for name in ("honest", "papers")]
    assert same[0] == same[1]


# --- side by side ---------------------------------------------------------------------------------------------------------


def table(ground: tuple[Settings, Prepared], folder: Path, methods: tuple[str, ...], **more: Any) -> Settings:
    settings, _ = ground
    cell = dataclasses.replace(settings.distill, student="resnet8")
    places = {"out": str(folder / "model"), "record": str(folder / "record")}
    return dataclasses.replace(settings, **places, **more, methods=methods, distill=cell)


def test_a_table_leaves_what_its_cells_would_leave(ground: tuple[Settings, Prepared], tmp_path: Path) -> None:
    """Bytes of three files each, every epoch's metrics, and a record of its own."""
    methods = ("kd", "crd", "ft", "mlkd")
    here = table(ground, tmp_path / "table", methods, seeds=(0, 1))
    data = ground[1]
    session.run(assemble.table(here, data), data, here)
    uids = set()
    for method in methods:
        for seed in (0, 1):
            alone = run(ground, tmp_path / method / str(seed), method, seed, disturb=3)
            below = Path(str(seed)) / method
            for name in FILES:
                assert (tmp_path / "table/model" / below / name).read_bytes() == alone[name], (method, seed, name)
            kept = tmp_path / "table/record" / below
            lines = [line["values"] for line in record.read_metrics(kept)]
            assert [{k: v for k, v in line.items() if not k.startswith(OF_THE_MOMENT)} for line in lines] == alone["lines"]
            facts = record.read(kept)
            assert {key: facts[key] for key in ("final", "outputs", "inputs", "params", "seeds")} == {
                key: alone[key] for key in ("final", "outputs", "inputs", "params", "seeds")
            }
            assert facts["status"] == "FINISHED"
            uids.add(facts["uid"])
    assert len(uids) == 8


def test_a_table_that_is_broken_off_goes_on(
    ground: tuple[Settings, Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second seed: the first is not trained again."""
    data = ground[1]
    whole = table(ground, tmp_path / "whole", ("kd", "at"), seeds=(0, 1))
    session.run(assemble.table(whole, data), data, whole)
    here = table(ground, tmp_path / "table", ("kd", "at"), seeds=(0, 1), resume_every=0.0)
    trained: list[int] = []
    usual = session.train_group

    def until_the_second(seats: Any, *rest: Any) -> None:
        trained.append(seats[0].job.seed)
        if len(trained) == 2:
            log = record.Record.log

            def killed(self: Any, values: Any, step: int) -> None:
                log(self, values, step)
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(record.Record, "log", killed)
                usual(seats, *rest)
        usual(seats, *rest)

    monkeypatch.setattr(session, "train_group", until_the_second)
    with pytest.raises(KeyboardInterrupt):
        session.run(assemble.table(here, data), data, here)
    first = (tmp_path / "table/model/0/kd" / checkpoint.WEIGHTS).stat().st_mtime_ns
    session.run(assemble.table(here, data), data, here)
    assert trained == [0, 1, 1]
    assert (tmp_path / "table/model/0/kd" / checkpoint.WEIGHTS).stat().st_mtime_ns == first
    for below in ("0/kd", "0/at", "1/kd", "1/at"):
        a, b = (tmp_path / name / "model" / below for name in ("whole", "table"))
        assert all((a / name).read_bytes() == (b / name).read_bytes() for name in FILES)
        assert [line["step"] for line in record.read_metrics(tmp_path / "table/record" / below)] == [1, 2]


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ([{"name": "a b", "methods": ["at"]}], "tables[0].name: expected a name of its own"),
        ([{"name": "a", "methods": []}], "tables[0].methods: at least one is needed"),
        ([{"name": "a", "methods": ["kd"]}], "tables[0].methods: kd is in methods already"),
        ([{"name": "a", "methods": ["att"]}], "tables[0].methods: there is no 'att'; did you mean 'at'?"),
        ([{"name": "a", "methods": ["at"]}, {"name": "a", "methods": ["sp"]}], "tables[1].name: expected a name of its own"),
        ([{"name": "a"}], "tables[0]: methods is missing, expected {name, methods}"),
        (["at"], "tables[0]: expected {name, methods}, got 'at'"),
        ([{"name": "a", "methods": ["at"], "seed": 1}], "tables[0]: expected {name, methods}"),
    ],
)
def test_a_table_that_cannot_be_is_one_line(tables: list[Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        config.resolve(settings_of.overlay(settings_of.defaults(), {"methods": ["kd"], "tables": tables}))
    assert said in str(caught.value)
