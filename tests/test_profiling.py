"""`python -m pupil profile` measures the configured cell, and `flops` counts what a step computes."""

import dataclasses
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from pupil import flops, profiling
from pupil.data import Data, prepare
from pupil.fit import activate, step, teacher_features
from pupil.optim import Optim, make_optimizer
from pupil.parts import PARTS, Parts
from pupil.settings import Distill, Settings
from tests import tiny

CPU = torch.device("cpu")


def test_flops_of_a_step_are_those_of_its_products() -> None:
    layer, x = nn.Linear(30, 50, bias=False), torch.randn(7, 30)
    assert flops.count(lambda: layer(x)) == 2 * 7 * 30 * 50
    assert flops.count(lambda: layer(x).sum().backward()) == 2 * 2 * 7 * 30 * 50, "and the gradient of the weights"
    line = flops.told(3 * 10**9, 0.5, 12e9, torch.bfloat16)
    assert line == "3.0 GFLOP a step, 6 GFLOP/s, 50 % of the 12 of a bfloat16 matrix product"


def test_peak_is_the_speed_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(flops.SIDE, "cpu", 64)
    clock = iter(range(1000))
    monkeypatch.setattr(flops.time, "perf_counter", lambda: float(next(clock)))
    assert flops.peak(CPU) == 2 * 64**3, "in one second"


@pytest.mark.parametrize("optimizer", ["sgd", "dot"])
def test_a_step_taken_apart_is_the_same_step(optimizer: str) -> None:
    found = []
    for on in (False, True):
        method = tiny.make("kd", {"kl": 1.0})
        phase = method.phases()[0]
        activate(method, phase)
        sgd, _ = make_optimizer(phase, Optim(lr=0.1, optimizer=optimizer))
        parts, batch = Parts(on, CPU), tiny.first_batch()
        for _ in range(2):
            parts.step(method, partial(teacher_features, method.teacher), batch, phase, sgd)
        found.append(tiny.state(method))
        named = [part for part in PARTS[1:] if parts.seconds[part] > 0]
        assert set(named) == (set(PARTS[1:]) - ({"optimiser"} if optimizer == "dot" else set()) if on else set())
        step(method, method.teacher.features(batch.images), batch, phase, sgd)  # nothing is left of the clocks
        assert "features" not in method.student.__dict__
    assert tiny.same(*found)


def test_profile_of_a_configured_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profiling, "WARM", 1)
    monkeypatch.setitem(flops.SIDE, "cpu", 64)
    data = Data(train_images=100, val_images=10, test_images=10, image_size=16)
    prepare(data, tmp_path / "out/data")
    cell = Distill(teacher="resnet14", method="simkd")
    settings = Settings(data=data, device="cpu", teachers=("resnet20",), optim=Optim(batch_size=16), distill=cell)
    profiling.profile(settings)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("resnet8 by simkd from an untrained resnet14: images in memory (loader auto)")
    assert re.fullmatch(r"  [\d.]+ ms a step \(quartiles [\d.]+ to [\d.]+\), [\d,]+ images/s", lines[1])
    assert "s for the 7 steps of an epoch" in lines[2]
    assert [line[2:22].strip() for line in lines[3:10]] == list(PARTS)
    assert lines[10].startswith("  bound by ")
    assert "GFLOP a step" in lines[11]
    whole = dataclasses.replace(settings, optim=Optim(batch_size=200))
    profiling.profile(whole)
    assert "for the 1 steps of an epoch" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"], "nothing is written"
