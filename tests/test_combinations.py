"""What goes with what: the matrix that is printed, and the combinations that none of the five systems has.

SimKD from a teacher retrained by SH-KD is in test_simkd, TH-KD on a subset in test_subsets, SimKD after REFILLED's first
phase in test_refilled.
"""

import re
from dataclasses import replace

import pytest
import torch

from pupil import combinations
from pupil.assemble import crosses_tasks
from pupil.combinations import SITUATIONS, attempt, general, lines, refusal
from pupil.methods import METHODS
from pupil.methods.base import Setup
from pupil.methods.crd import CRD
from pupil.methods.sakd import SAKD
from pupil.net import probe
from tests import tiny

BY_NAME = {situation.name: situation for situation in SITUATIONS}


@pytest.fixture(scope="module")
def printed() -> list[str]:
    return list(lines())


@pytest.fixture(scope="module")
def matrix(printed: list[str]) -> dict[str, dict[str, str]]:
    columns = [m.start() for m in re.finditer(r"\S+( \S+)*", printed[0])]
    names = [situation.name for situation in SITUATIONS]
    rows = printed[1 : 1 + len(METHODS)]
    return {row.split()[0]: dict(zip(names, (row[c:].split()[0] for c in columns), strict=True)) for row in rows}


@pytest.mark.slow
def test_the_matrix_is_that_of_the_mathematics(matrix: dict[str, dict[str, str]]) -> None:
    assert list(matrix) == list(METHODS)
    assert {cell for row in matrix.values() for cell in row.values()} == {"yes", "-"}
    for name, row in matrix.items():
        assert row["subset"] == row["sh-kd"] == row["dot"] == "yes", name
        assert (row["task"] == "yes") == crosses_tasks(name, METHODS[name].Config()), name
        assert row["init"] == row["frozen"] == ("-" if name == "simkd" else "yes"), name
        assert row["ls of"] == "-" or METHODS[name].on_logits, name
    spotted = "fitnet at sp cc vid rkd pkt ft nst kdsvd crd"  # those of the paper's suite
    assert {name for name, row in matrix.items() if row["sakd of"] == "yes"} >= set(spotted.split())
    assert [cell for cell in matrix["kd"].values() if cell == "-"] == ["-", "-"]
    on_maps = "fitnet at sp vid ab ft fsp nst kdsvd semckd simkd ofd reviewkd sakd"
    assert {name for name, row in matrix.items() if row["views"] == "-"} >= {"mlkd", *on_maps.split()}
    assert {name for name, row in matrix.items() if row["width"] == "-"} >= {"thkd", "kdeth", "crdth", "fsp"}


@pytest.mark.slow
def test_every_no_has_its_reason(printed: list[str], matrix: dict[str, dict[str, str]]) -> None:
    below = printed[printed.index("why not") + 1 :]
    told = {
        (column.strip(), name)
        for line in below[::2]
        for column, _, names in [line.partition(": ")]
        for name in names.split(", ")
    }
    assert told == {(column, name) for name, row in matrix.items() for column, cell in row.items() if cell == "-"}
    assert all(len(reason.split()) > 6 for reason in below[1::2])


def test_equal_reasons_are_told_once() -> None:
    assert (
        general("at: hp.at.head must be own at once, got 'at'", "at")
        == "METHOD: hp.METHOD.head must be own at once, got 'METHOD'"
    )


def test_a_trial_is_a_real_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss is that of the method, and what the loop says no to is no refusal of the combination."""
    [terms] = attempt("fitnet", BY_NAME["task"])
    assert set(terms) == {"ce", "knowledge"}
    assert all(term.raw.item() > 0 for term in terms.values())
    monkeypatch.setattr(combinations, "step", lambda *a: {"ce": terms["ce"]._replace(raw=torch.tensor(float("nan")))})
    with pytest.raises(AssertionError, match="fitnet"):
        refusal("fitnet", BY_NAME["task"])


def test_a_policy_over_crd_on_a_subset_of_the_classes() -> None:
    """Spot-adaptive CRD from a teacher of more classes, cut to the student's."""
    teacher = combinations.of_more_classes().requires_grad_(False).eval()
    around = tiny.setup()
    setup = Setup(around.student, teacher, around.s, probe(teacher, tiny.SIZE), around.labels, 8)
    method = SAKD(setup, replace(SAKD.Config(), of="crd"))
    before = {name: p.clone() for name, p in method.named_parameters()}
    assert isinstance(method.inner, CRD)
    banks = method.inner.bank_s.clone()
    trained = tiny.train(method, teacher)
    assert trained.last["head.weight"].shape[0] == tiny.CLASSES
    moved = {name.split(".")[0] for name, p in method.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"student", "inner", "agent"}
    assert not torch.equal(method.inner.bank_s, banks)
    shares = {
        name: value.item() for name, value in method.observed().items() if name.startswith("distilled_") and value.dim() == 0
    }
    assert shares.keys() == {"distilled_embedding", "distilled_logits"}
    assert all(0 <= share <= 1 for share in shares.values())
