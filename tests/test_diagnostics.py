"""What a method shows while it trains: gradient norms of its terms, its own scalars, its matrices as pictures."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from pupil import figures
from pupil import fit as loop
from pupil.fit import gradient_norms
from pupil.methods.base import Method
from pupil.optim import Optim
from tests import tiny


def journal(method: Method, epochs: int) -> list[dict[str, float]]:
    lines: list[dict[str, float]] = []

    def log(values: Mapping[str, float], epoch: int) -> None:
        lines.append(dict(values))

    optim = Optim(epochs=epochs, lr=0.01, milestones=())
    tiny.fit(method, method.teacher, tiny.loader(), tiny.loader(None), optim, log, tiny.silently)
    return lines


def test_norms_are_those_of_the_weighted_terms_on_the_shared_trunk() -> None:
    method, batch = tiny.make("dkd", {"warmup": 1}).train(), tiny.first_batch()
    terms = method(batch, method.teacher.features(batch.images), method.loss)
    norms = gradient_norms(terms, method.student)
    assert norms.keys() == terms.keys()
    for name, term in terms.items():
        method.zero_grad()
        (term.weight * term.raw).backward(retain_graph=True)
        trunk = [p for n, p in method.student.named_parameters() if n.startswith(("stem", "stages"))]
        expected = sum(p.grad.square().sum() for p in trunk if p.grad is not None) ** 0.5
        assert norms[name].item() == pytest.approx(float(expected), rel=1e-5)
        assert norms[name] > 0


def test_a_term_that_does_not_reach_the_trunk_has_no_norm() -> None:
    method = tiny.make("ft")
    lines = journal(method, 1)
    assert not [key for key in lines[0] if "/gradient/" in key], "the first phase trains the paraphraser alone"
    assert [key for key in lines[1] if "/gradient/" in key]


def test_ten_looks_in_a_phase_however_long() -> None:
    looked = [any("/gradient/" in key for key in line) for line in journal(tiny.make("kd"), 21)]
    assert looked[0]
    assert 10 <= sum(looked) <= 11
    assert all(any("/gradient/" in key for key in line) for line in journal(tiny.make("kd"), 3))


@pytest.mark.parametrize("name", ["crd", "cc", "kdsvd", "mlkd"])
def test_looking_changes_no_bit_of_the_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def weights() -> dict[str, torch.Tensor]:
        method = tiny.make(name)
        return tiny.train(method, method.teacher, epochs=2).last

    often = weights()
    monkeypatch.setattr(loop, "gradient_norms", lambda terms, student: {})
    assert tiny.same(often, weights())


def test_scalars_become_metrics_and_matrices_pictures(tmp_path: Path) -> None:
    method = tiny.make("semckd")
    lines = journal(method, 1)
    observed = method.observed()
    matrices = {name: x for name, x in observed.items() if x.dim() == 2}
    assert matrices
    assert not [key for key in lines[0] if key.split("/")[-1] in matrices]
    for name, matrix in matrices.items():
        figures.heat(matrix, name, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    crd = journal(tiny.make("crd"), 1)[0]
    positive = [value for key, value in crd.items() if "positive" in key]
    assert len(positive) == 2
    assert all(0 < p < 1 for p in positive)
