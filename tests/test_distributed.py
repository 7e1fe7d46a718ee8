"""Two and three processes train as one does: every method, with batches that do not divide evenly.

In float64 (`.float()` gives float64 there), so that rounding cannot hide what is missing.
"""

import contextlib
import os
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

from pupil import record
from pupil.config import ROOT
from pupil.divided import divided
from pupil.methods.alone import Alone
from pupil.methods.base import Answers
from pupil.net import Net, Stage
from pupil.optim import Optim
from tests import tiny

pytestmark = pytest.mark.slow
Case = tuple[
    str, Mapping[str, Any], Mapping[str, Any], int
]  # method, its settings, the optimiser's, training images (batches of 8)
CASES: dict[str, Case] = {
    **{f"{name} {tiny.label(hp)}": (name, hp, {}, 11) for name, hp in tiny.VARIANTS},
    "crd, a last batch of one": ("crd", {"kl": 1.0}, {}, 9),
    "rkd by dot, a last batch of one": ("rkd", {"kl": 1.0}, {"optimizer": "dot"}, 9),
    "kd by dot": ("kd", {}, {"optimizer": "dot"}, 11),
    "random layers": ("random", {}, {}, 11),
}
OF_THREE = ("kd by dot", "crd, a last batch of one", "simkd default", "semckd default", "random layers")
WORLDS = (1, 2, 3)
TOLERANCE = 1e-10


class Dropped(nn.Module):
    """Drop path: whole images."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.7) if self.training else x


class Flat(nn.Module):
    """Batch norm of vectors, without weights and with a running mean of all batches; dropout before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6, affine=False, momentum=None)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, self.drop(self.norm(x.mean((2, 3))))


class Answering(Alone):
    """Has another answer than the student's, that its student gives in another way."""

    def answers(self) -> Answers:
        return {"embedding": lambda images: self.student.features(images).embedding}


def random_net() -> Net:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6, track_running_stats=False), Dropped())
    return Net(
        stem,
        [Stage(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.Dropout2d(0.2), act=nn.ReLU())],
        nn.Linear(6, tiny.CLASSES),
        pool=Flat(),
    )


def train(name: str, hp: Mapping[str, Any], optim: Mapping[str, Any], images: int) -> dict[str, Any]:
    """Two epochs; what is logged, and all weights, statistics and banks."""
    method = Answering(random_net()) if name == "random" else tiny.make(name, hp).double()
    teacher = None if isinstance(method, Alone) else method.teacher.double()
    logged: list[dict[str, float]] = []
    options = Optim(epochs=2, lr=0.01, milestones=(), **optim)
    torch.manual_seed(3)
    with divided(method, teacher):
        tiny.fit(
            method,
            teacher,
            tiny.loader(0, images),
            tiny.loader(None, 11),
            options,
            lambda values, epoch: logged.append({k: v for k, v in values.items() if k != "images_per_second"}),
            tiny.silently,
        )
    numbers = {f"epoch {i}: {k}": torch.tensor(v) for i, values in enumerate(logged, 1) for k, v in values.items()}
    return {**numbers, **tiny.state(method), "the next random number": torch.rand(())}


def work(rank: int, processes: int, folder: Path) -> None:
    """One process of several, all cases."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    dist.init_process_group("gloo", f"file://{folder}/meet-{processes}", rank=rank, world_size=processes)
    names = OF_THREE if processes == 3 else CASES
    torch.save({name: train(*CASES[name]) for name in names}, folder / f"{processes}-{rank}.pt")
    dist.destroy_process_group()


Found = dict[tuple[int, int], dict[str, dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """(processes, rank) -> case -> what it left."""
    folder = tmp_path_factory.mktemp("processes")
    for n in WORLDS:
        spawn(work, (n, folder), n)
    return {(n, rank): torch.load(folder / f"{n}-{rank}.pt") for n in WORLDS for rank in range(n)}


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest number if that exceeds 0.001."""
    a, b = a.double(), b.double()
    return ((a - b).abs().max() / a.abs().max().clamp(min=1e-3)).item()


@pytest.mark.parametrize("case", CASES)
def test_processes_train_as_one(case: str, found: Found) -> None:
    alone, gaps = found[1, 0][case], {}
    for who, runs in found.items():
        if case in runs:
            assert runs[case].keys() == alone.keys()
            gaps |= {(*who, key): gap(value, runs[case][key]) for key, value in alone.items()}
    assert len({who[:2] for who in gaps}) == (6 if case in OF_THREE else 3)
    worst = max(gaps, key=lambda key: gaps[key])
    assert gaps[worst] <= TOLERANCE, f"{worst}: {gaps[worst]}"


def test_training_changes_what_is_compared(found: Found) -> None:
    name = "crd, a last batch of one"
    before = tiny.state(tiny.make(*CASES[name][:2]))
    after = found[1, 0][name]
    assert all(gap(before[key], after[key]) > 1e-4 for key in ("student.head.weight", "embed_s.weight", "bank_s"))


PAGE = ("data.val_images=10", "data.test_images=20", "data.train_images=42", "optim.batch_size=10", "device=cpu")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def stage(folder: Path, name: str, *words: str, by: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *by, str(ROOT / "stages" / f"{name}.py"), *words]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_"))}
    env |= {"OMP_NUM_THREADS": "1", "DVC_ROOT": str(folder)}  # where the MLflow store is
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the processes say themselves; torchrun adds a report of its own."""
    assert done.returncode
    return [line for line in done.stderr.splitlines() if line.startswith(("error:", "[rank"))]


def test_a_stage_by_two_processes(tmp_path: Path) -> None:
    done = stage(tmp_path, "prepare", *PAGE[:3], "out=data", "record=prepared")
    assert not done.returncode, done.stderr
    logged, words = [], (*PAGE, "train.role=student", "optim.epochs=2", "optim.lr=1e-6", "prepared=data")
    for n, more in ((1, ()), (2, ("processes=2", "loader=streamed"))):
        done = stage(tmp_path, "train", *words, *more, f"out=by{n}", f"record=record{n}")
        assert not done.returncode, done.stderr
        assert done.stdout.count("test top-1") == 1, "the first process alone speaks"
        facts = record.read(tmp_path / f"record{n}")
        assert facts["status"] == "FINISHED"
        assert facts["environment"]["device"] == {1: "cpu", 2: "2 processes, cpu"}[n]
        logged.append([line["values"] for line in record.read_metrics(tmp_path / f"record{n}")])
    for a, b in zip(*logged, strict=True):
        for key in ("train/loss", "val/nll"):
            assert b[key] == pytest.approx(a[key], rel=1e-5)  # float32; at this learning rate the weights stay
        assert b["val/top1"] == a["val/top1"]
    words = (*words, "out=by2", "record=record3")
    occupied = ["error: by2 is not empty; nothing is overwritten: choose another folder or remove it"]
    assert errors(stage(tmp_path, "train", *words, by=TORCHRUN)) == occupied
    alone = stage(tmp_path, "train", *words, "processes=2")
    assert alone.stderr.splitlines() == occupied, "found before other processes are started"
    done = stage(tmp_path, "prepare", *PAGE[:3], "out=more", "record=more_record", by=TORCHRUN)
    assert errors(done) == ["error: prepare runs in one process, got 2 of torchrun; start it with python"]
    assert not {"more", "more_record", "record3"} & {path.name for path in tmp_path.iterdir()}
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as store:
        assert store.execute("select name, status from runs order by start_time").fetchall() == [
            ("prepare digits", "FINISHED"),
            *2 * [("resnet8 alone, seed 0", "FINISHED")],
        ]
