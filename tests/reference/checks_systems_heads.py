"""Checkers of KDE, KDETH and CRDTH: the whole method's loss on what a student and a teacher of known classifiers say.

The authors' loss is the method's own term plus delta / beta times that with the teacher's classifier, and is multiplied
by beta afterwards: ours with beta 1 and delta / beta for delta.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pupil.methods.base import Setup
from pupil.methods.crdth import CRDTH
from pupil.methods.kde import KDE
from pupil.methods.kdeth import KDETH
from pupil.types import Features, Terms
from tests.reference.blocks import Row, Values, batch_of, given, linear, said, setup_of, total
from tests.reference.checks_first import banks_and_Z
from tests.reference.golden import Case, gradients, module_results

INPUT = frozenset({"th_weight"})  # the ratio of two of its inputs


def check_kde(case: Case) -> Values:
    e_s = case.leaf("fs_embedding")
    s, t = said(e_s), said(case.tensor("ft_embedding"))
    loss = total(KDE(setup_of(s, t), KDE.Config(ce=0.0, kl=0.0, beta=1.0)).loss(s, t, batch_of(e_s)))
    loss.backward()
    return {"loss": loss} | gradients({"fs_embedding": e_s})


def prepared(case: Case, e_s: Tensor) -> tuple[Setup, Features, Features, dict[str, Any]]:
    """Setup, what student and teacher say, and the weights."""
    student, teacher = given(linear(case, "student_head")), given(linear(case, "teacher_head"))
    s, t = student.features(e_s[:, :, None, None]), said(case.tensor("ft_embedding"), case.tensor("logits_t"))
    samples = case.integer("n_data") if "n_data" in case else len(e_s)
    beta = case.number("beta")
    config = {"ce": 0.0, "kl": 0.0, "beta": 1.0, "delta": case.number("delta") / beta if beta else 0.0}
    return setup_of(s, t, student, teacher, samples), s, t, config | {"T_head": case.number("temperature")}


def results(case: Case, terms: Terms, own: str, e_s: Tensor) -> Values:
    loss = total(terms)
    loss.backward()
    values = {f"loss_{own}": terms["knowledge"].raw, "loss_kdth": terms["teachers_head"].raw, "loss": loss}
    return values | {"loss_times_beta": case.number("beta") * loss} | gradients({"fs_embedding": e_s})


def check_kdeth(case: Case) -> Values:
    e_s = case.leaf("fs_embedding")
    setup, s, t, config = prepared(case, e_s)
    return results(case, KDETH(setup, KDETH.Config(**config)).loss(s, t, batch_of(e_s)), "kde", e_s)


class GivenNegatives(CRDTH):
    """CRDTH that draws nothing."""

    rows: Tensor  # (B, k) training ids

    def negatives(self, labels: Tensor) -> Tensor:
        return self.rows


def check_crdth(case: Case) -> Values:
    e_s, rows = case.leaf("fs_embedding"), case.tensor("contrast_idx")
    assert torch.equal(rows[:, 0], case.tensor("idx"))
    setup, s, t, config = prepared(case, e_s)
    config |= {"dim": case.integer("feat_dim"), "k": case.integer("nce_k"), "tau": case.number("nce_t")}
    method = GivenNegatives(setup, CRDTH.Config(**config, momentum=case.number("nce_m")))
    method.rows = rows[:, 1:]
    modules: dict[str, nn.Module] = {"embed_s_linear": method.embed_s, "embed_t_linear": method.embed_t}
    case.load(modules)
    with torch.no_grad():
        method.bank_s.copy_(case.tensor("memory_v1_before"))
        method.bank_t.copy_(case.tensor("memory_v2_before"))
    values = results(case, method.loss(s, t, batch_of(e_s, ids=rows[:, 0])), "crd", e_s)
    return values | banks_and_Z(method) | module_results(modules)


ROWS = {
    "KDE": Row(("kde",), check_kde),
    "KDE + TH": Row(("kdeth",), check_kdeth, INPUT),
    "CRD + TH": Row(("crdth",), check_crdth, INPUT),
}
