"""Every method gives the loss and the gradients of its literal formula, which the benchmark measures it against."""

from typing import Any

import pytest
from benchmarks import loader
from benchmarks.cases import NAMES, Size, case, disagreement
from benchmarks.literal_maps import LITERAL

from pupil.methods import METHODS
from tests import tiny

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
