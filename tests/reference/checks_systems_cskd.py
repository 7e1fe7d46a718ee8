"""Checkers of CSKD: renormalised KD through the cut classifier, OPL, ICV, and their sum."""

import torch
from torch import Tensor, nn

from pupil.methods.cskd import CSKD
from pupil.net import cut
from pupil.types import Features, Terms
from tests.reference.blocks import Row, Values, batch_of, given, said, setup_of, total
from tests.reference.golden import Case, gradients


def cut_teacher(case: Case) -> Features:
    """What a teacher with these logits says once it is cut: its embedding are the logits, its classifier the identity."""
    logits = case.tensor("logits_t")
    teacher = given(nn.Linear(logits.shape[1], logits.shape[1]))
    with torch.no_grad():
        teacher.head.weight.copy_(torch.eye(logits.shape[1]))  # type: ignore[operator, union-attr]
        teacher.head.bias.zero_()  # type: ignore[operator, union-attr]
    cut(teacher, case.tensor("classes_of_interest").tolist())
    with torch.no_grad():
        return teacher.features(logits[:, :, None, None])


def terms_of(config: CSKD.Config, s: Features, t: Features, labels: Tensor | None) -> Terms:
    return CSKD(setup_of(s, t), config).loss(s, t, batch_of(s.embedding, labels))


def check_renormalised(case: Case) -> Values:
    z_s, t = case.leaf("logits_s"), cut_teacher(case)
    config = CSKD.Config(ce=0.0, kl=case.number("alpha"), T=case.number("temperature"), opl=0.0, icv=0.0)
    loss = total(terms_of(config, said(torch.zeros(len(z_s), 2), z_s), t, None))
    loss.backward()
    return {"loss": loss} | gradients({"logits_s": z_s})


def of_embedding(case: Case, config: CSKD.Config) -> Values:
    e, labels = case.leaf("fs_pooled"), case.tensor("labels")
    classes = case.integer("num_classes") if "num_classes" in case else int(labels.max()) + 1
    s = said(e, torch.zeros(len(e), classes))
    loss = total(terms_of(config, s, s, labels))
    loss.backward()
    return {"loss": loss} | gradients({"fs_pooled": e})


def check_opl(case: Case) -> Values:
    return of_embedding(case, CSKD.Config(ce=0, kl=0, opl=case.number("opl_hyper"), gamma=case.number("gamma"), icv=0))


def check_icv(case: Case) -> Values:
    return of_embedding(case, CSKD.Config(ce=0, kl=0, opl=0, icv=case.number("icv_hyper")))


def check_total(case: Case) -> Values:
    z_s, e = case.leaf("logits_s"), case.leaf("fs_pooled")
    config = CSKD.Config(
        ce=case.number("ce_hyper"),
        kl=case.number("alpha"),
        T=case.number("temperature"),
        opl=case.number("opl_hyper"),
        icv=case.number("icv_hyper"),
        gamma=case.number("gamma"),
    )
    terms = terms_of(config, said(e, z_s), cut_teacher(case), case.tensor("labels"))
    names = {"ce": "ce", "renorm_kd": "kl", "opl": "opl", "icv": "icv"}
    parts: Values = {f"loss_{theirs}": terms[ours].weight * terms[ours].raw for theirs, ours in names.items()}
    loss = total(terms)
    loss.backward()
    return {"loss": loss} | parts | gradients({"logits_s": z_s, "fs_pooled": e})


ROWS = {
    "renormalised KD": Row(("cskd",), check_renormalised),
    "OPL": Row(("cskd",), check_opl),
    "ICV": Row(("cskd",), check_icv),
    "CSKD": Row(("cskd",), check_total),
}
