"""What the benchmarks measure against does the same as ours: every method's literal formula, and the common loop."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import loader
from benchmarks import step as steps
from benchmarks import table as tables
from benchmarks.cases import NAMES, Size, case, disagreement
from benchmarks.common_loop import CommonLoop, Images
from benchmarks.literal_maps import LITERAL
from benchmarks.parts import PARTS, Parts
from benchmarks.step import CLASSES, MEAN, STD, Ours, made

from pupil.data.resident import Augment, Resident
from pupil.methods import METHODS
from pupil.types import Batch
from tests import tiny

CPU = torch.device("cpu")
SMALL = Size(8, "resnet8", "resnet14", pixels=16, classes=5, images=40)
OTHERWISE: list[tuple[str, dict[str, Any]]] = [
    ("dist", {"T": 1.0}),
    ("nkd", {"T": 3.0, "gamma": 3.5}),
    ("uskd", {"alpha": 0.1, "beta": 0.1, "mu": 0.1}),
    ("mlkd", {"beta": 0.5, "T": 1.0}),
    ("ls", {"T": 4.0, "beta": 12.0}),
    ("rkd", {"distance": 1.0, "angle": 2.0}),
    ("at", {"p": 4}),
    ("kdsvd", {"k": 2}),
    ("ft", {"p2": 2}),
]


def test_literal_formulas_are_of_methods() -> None:
    assert LITERAL.keys() <= METHODS.keys()


@pytest.mark.parametrize(
    ("name", "hp"), [*((n, {}) for n in NAMES if n != "crd"), *OTHERWISE], ids=tiny.label
)  # crd: its drawings differ
def test_loss_and_gradients_are_those_of_the_literal_formula(name: str, hp: dict[str, Any]) -> None:
    quick: dict[str, Any] = {"k": 16, "dim": 8} if name.startswith("crd") else {}
    loss, gradient = disagreement(case(name, SMALL, "cpu", **(quick | hp)))
    assert loss < 1e-4
    assert gradient < 1e-3


def test_loaders_are_measured_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    loader.main(["--images", "12", "--size", "16", "--batch", "4", "--rounds", "1", "--device", "cpu"])
    _, *lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines]
    wanted = [(crop, name) for crop, names in loader.CROPS.items() for name in ("plain", *names)]
    assert [(row[0], row[1]) for row in rows] == [row for row in wanted if row[1] != "dali" or loader.installed()]
    assert all(float(row[2].replace(",", "")) > 0 for row in rows)
    assert {row[3] for row in rows if row[1] == "plain"} == {"1.00"}


@pytest.mark.parametrize("name", ["kd", "simkd"])
def test_common_loop_takes_the_step_that_ours_takes(name: str) -> None:
    pixels, labels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % CLASSES
    literal, ours = (made(name, ("resnet14", "resnet8"), labels, CPU) for _ in range(2))
    images = Images(pixels, labels, MEAN, STD)
    common = CommonLoop(name, literal, images, 8, 0, CPU)
    batch = next(common.batches())
    common.step(batch, Parts(False, CPU))
    side = Ours(ours, Resident(pixels, labels, MEAN, STD, 8, CPU, 0, Augment(4, True)))
    parts = Parts(name == "kd", CPU)  # the profiled step is the same step
    side.step(Batch(*batch), parts)
    for key, value in literal.student.state_dict().items():
        torch.testing.assert_close(ours.student.state_dict()[key], value, rtol=1e-4, atol=1e-6)
    assert all(parts.seconds[part] > 0 for part in PARTS[1:]) == parts.on


@pytest.mark.parametrize("name", [name for name in tables.ROWS if name not in ("kd", "crd")])
def test_each_row_of_the_table_takes_the_common_loop_s_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CRD draws its negatives at random; its formula is compared above, with rows given."""
    monkeypatch.setattr(tables, "PAIRS", {"tiny": ("resnet14", "resnet8")})
    n = 64 if name == "semckd" else 8
    pixels, labels = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8), torch.arange(n) % CLASSES
    teacher = tables.network("resnet14", CPU).requires_grad_(False).eval()
    torch.manual_seed(1)
    literal = tables.made(name, "tiny", labels, teacher)
    torch.manual_seed(1)
    ours = tables.made(name, "tiny", labels, teacher)
    common = CommonLoop(tables.ROWS[name][0], literal, Images(pixels, labels, MEAN, STD), n, 0, CPU)
    batch = next(common.batches())
    common.step(batch, Parts(False, CPU))
    side = tables.Table([ours], teacher, Resident(pixels, labels, MEAN, STD, n, CPU, 0, Augment(4, True)))
    side.begin()
    side.step(Batch(*batch), Parts(False, CPU))
    for key, value in literal.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-3, atol=1e-5, msg=key)


def test_table_benchmark_prints_a_table_and_writes_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables, "PAIRS", {"tiny": ("resnet8", "resnet8")})
    monkeypatch.setattr(tables, "STEPS", {"tiny": 1})
    words = "--pair tiny --rows alone,kd,at --batch 4 --threads 1 --workers 1 --rounds 2"
    monkeypatch.setattr(sys, "argv", ["table", *words.split(), "--json", str(tmp_path / "table.json")])
    threads = torch.get_num_threads()
    tables.main()
    torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert all(f"| {name} |" in said for name in ("alone", "kd", "at", "all"))
    assert "3 trainings" in said
    found = json.loads((tmp_path / "table.json").read_text())
    assert set(found["seconds"]) == {"alone", "kd", "at"}
    assert found["clock"]["quartiles"][0] <= found["clock"]["ratio"] <= found["clock"]["quartiles"][1]


def test_time_of_parts_adds_up_and_names_what_binds() -> None:
    parts = Parts(True, CPU)
    with parts("rest"), parts("loss", "rest"):
        time.sleep(0.02)
    assert parts.seconds["loss"] >= 0.02 > parts.seconds["rest"] >= 0
    assert parts.table(1)[-1] == "  bound by computing: it waits for batches 0 % of the time"
    with parts(PARTS[0]):
        time.sleep(0.1)
    assert "bound by loading" in parts.table(1)[-1]


def stepped(words: str, monkeypatch: pytest.MonkeyPatch, json_file: Path) -> list[dict[str, Any]]:
    """The rows of benchmarks.step for a tiny pair."""
    monkeypatch.setattr(steps, "PAIRS", {"tiny": ("resnet8", "resnet8")})
    monkeypatch.setattr(steps, "TURN", {"tiny": 2})
    words = f"--pairs tiny --batch 4 --threads 1 --workers 1 --rounds 3 --compile false {words}"
    monkeypatch.setattr(sys, "argv", ["step", *words.split(), "--json", str(json_file)])
    threads = torch.get_num_threads()
    try:
        steps.main()
    finally:
        torch.set_num_threads(threads)
    return json.loads(json_file.read_text())["rows"]


def test_step_benchmark_prints_a_table_and_writes_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = stepped("--methods kd --profile", monkeypatch, tmp_path / "step.json")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("| tiny | kd |")]
    assert sum("bound by" in line for line in lines) == 2
    assert row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1]
    assert row["processor_quartiles"][0] <= row["processor_ratio"] <= row["processor_quartiles"][1]


def test_step_benchmark_measures_what_the_cache_costs_and_saves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, kept = stepped("--methods kd --views 2", monkeypatch, tmp_path / "step.json")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("| tiny | kd, 2 views kept |")]
    assert any(line.startswith("tiny, kd: filling a view takes ") for line in lines)
    assert "fill_ms" not in plain
    assert kept["fill_ms"] > 0
    assert kept["pays_after_epochs"] == pytest.approx(2 * kept["fill_ms"] / kept["saved_ms"])
    with pytest.raises(SystemExit):
        stepped("--methods simkd --views 2", monkeypatch, tmp_path / "none.json")
    assert "simkd reads more of the teacher than its logits and embeddings" in capsys.readouterr().err
