"""Training goes on from any point as if nothing had happened; side by side as alone: bit for bit."""

import random
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pupil import fit as loop
from pupil import points
from pupil.fit import Log, Trained, teacher_features
from pupil.methods.alone import Alone
from pupil.models import build
from pupil.optim import Optim
from pupil.training import Training
from pupil.types import UserError
from tests import tiny

OPTIM = Optim(epochs=2, lr=0.01, schedule="cosine")
DOT = Optim(epochs=2, lr=0.01, milestones=(1,), optimizer="dot")
KINDS = [*((name, hp, OPTIM) for name, hp in tiny.VARIANTS), ("kd", {}, DOT), ("crd", {"kl": 1.0}, DOT), ("alone", {}, OPTIM)]


class Killed(Exception):
    pass


class Journal(list[tuple[int, dict[str, float]]]):
    """What a training logs, its speed aside."""

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        self.append((epoch, {k: v for k, v in values.items() if k != "images_per_second"}))


def training(name: str, hp: Mapping[str, Any], optim: Optim, log: Log, disturb: int = 0) -> Training:
    """Built anew, as another process would."""
    if name == "alone":
        torch.manual_seed(0)
        method: Any = Alone(build(tiny.STUDENT, tiny.CLASSES))
    else:
        method = tiny.make(name, hp)
    torch.manual_seed(7)
    made = Training(method, optim, tiny.loader(None), log, tiny.loader(None, samples=8))
    torch.manual_seed(disturb)
    return made


def train(trainings: list[Training], point: Any = lambda: None) -> list[Trained]:
    teacher = getattr(trainings[0].method, "teacher", None)
    return loop.fit(trainings, partial(teacher_features, teacher), tiny.loader(0), tiny.silently, point)


def everything(trained: Trained, one: Training) -> dict[str, Tensor]:
    """The weights that are left, and all that the method has beside them."""
    state = one.state()
    return {
        **{f"last.{k}": v for k, v in trained.last.items()},
        **{f"best.{k}": v for k, v in trained.best_by_val.items()},
        **{f"method.{k}": v for k, v in state["tensors"].items()},
        "random": state["random"]["cpu"],
    }


def uninterrupted(name: str, hp: Mapping[str, Any], optim: Optim) -> tuple[dict[str, Tensor], Journal, int]:
    journal, count = Journal(), [0]

    def point() -> None:
        count[0] += 1

    one = training(name, hp, optim, journal.log)
    (trained,) = train([one], point)
    return everything(trained, one), journal, count[0]


@pytest.mark.parametrize(("name", "hp", "optim"), KINDS, ids=tiny.label)
def test_killed_at_any_point_it_ends_the_same(name: str, hp: dict[str, Any], optim: Optim, tmp_path: Path) -> None:
    whole, said, count = uninterrupted(name, hp, optim)
    assert count > 6
    draw = random.Random(f"{name} {hp}")
    for last in sorted({count - 1, *draw.sample(range(count), 3)}):
        journal, visited = Journal(), [0]
        one = training(name, hp, optim, journal.log)

        def point(one: Training = one, visited: list[int] = visited, last: int = last, journal: Journal = journal) -> None:
            if visited[0] == last:
                points.write(tmp_path / "point", {"state": one.state(), "said": len(journal)})
                raise Killed
            visited[0] += 1

        with pytest.raises(Killed):
            train([one], point)
        found = points.read(tmp_path / "point")
        del journal[found["said"] :]
        other = training(name, hp, optim, journal.log, disturb=last + 1)
        other.restore(found["state"])
        (trained,) = train([other])
        assert repr(list(journal)) == repr(list(said)), f"from point {last} of {count}"
        ends = everything(trained, other)
        assert [k for k in whole if not torch.equal(whole[k], ends[k])] == [], f"from point {last} of {count}"


def test_side_by_side_each_student_is_the_one_that_it_would_be_alone() -> None:
    """All methods and variants at once, those with several phases and views among them."""
    kinds = [kind for kind in KINDS if kind[0] != "alone" and kind[2] is OPTIM]
    teacher = tiny.make("kd").teacher
    journals = [Journal() for _ in kinds]
    together = []
    for (name, hp, optim), journal in zip(kinds, journals, strict=True):
        one = training(name, hp, optim, journal.log)
        one.method.setup = replace(one.method.setup, teacher=teacher)  # type: ignore[attr-defined]
        together.append(one)
    all_trained = train(together)
    for (name, hp, optim), journal, one, trained in zip(kinds, journals, together, all_trained, strict=True):
        alone, said, _ = uninterrupted(name, hp, optim)
        ends = everything(trained, one)
        assert [k for k in alone if not torch.equal(alone[k], ends[k])] == [], (name, hp)
        assert repr(list(journal)) == repr(list(said)), (name, hp)


# --- the file -------------------------------------------------------------------------------------------------------------

TREE = {"a": torch.arange(5), "b": [torch.ones(2, 2, dtype=torch.bool), None, 1.5], 3: {4: "x", "none": {}}, "bits": 0.1 + 0.2}


def test_a_point_gives_back_what_it_was_given(tmp_path: Path) -> None:
    points.write(tmp_path / "p", TREE)
    found = points.read(tmp_path / "p")
    assert torch.equal(found["a"], TREE["a"])
    assert torch.equal(found["b"][0], TREE["b"][0])
    assert (found["b"][1:], found[3], found["bits"]) == ([None, 1.5], TREE[3], TREE["bits"])
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_every_flipped_bit_and_every_lost_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "p"
    points.write(path, TREE)
    raw = path.read_bytes()
    draw = random.Random(0)
    for at in [0, 8, len(raw) - 1, *draw.sample(range(len(raw)), 60)]:
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1 :])
        with pytest.raises(UserError, match="is damaged"):
            points.read(path)
        path.write_bytes(raw[:at])
        with pytest.raises(UserError, match="is damaged"):
            points.read(path)


def test_a_point_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p"
    points.write(path, {"n": 1})

    def full(handle: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(points, "flush", full)
    with pytest.raises(OSError, match="No space left"):
        points.write(path, {"n": 2})
    assert points.read(path) == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["p"]
