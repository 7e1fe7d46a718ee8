"""Checkers of REFILLED: which triplets are mined, the accuracy by class means, and the losses of both phases."""

import torch
from torch import Tensor, nn

from pupil.methods.refilled import REFILLED, distances, ncm, semi_hard
from tests.reference.blocks import Row, Values, batch_of, given, said, setup_of, total
from tests.reference.golden import Case, gradients


def indices(pairs: Tensor, mined: Tensor) -> Values:
    """The triplets in the order of anchor, positive, negative."""
    pair, negative = mined.nonzero().unbind(1)
    return {"anchor_index": pairs[pair, 0], "positive_index": pairs[pair, 1], "negative_index": negative}


def merged(pairs: Tensor, mined: Tensor) -> Values:
    """Pairs that have negatives, and these, filled up with index 0 to the longest row."""
    pairs, mined = pairs[mined.any(1)], mined[mined.any(1)]
    mask = torch.arange(int(mined.sum(1).max())) < mined.sum(1, keepdim=True)
    negatives = torch.zeros(mask.shape, dtype=torch.int64)
    negatives[mask] = mined.nonzero()[:, 1]
    names = {
        "anchor_index": pairs[:, 0],
        "positive_index": pairs[:, 1],
        "negative_index": negatives,
        "negative_mask": mask.long(),
    }
    return {f"merged_{name}": value for name, value in names.items()}


def check_mining(case: Case) -> Values:
    pairs, mined = semi_hard(distances(case.tensor("embedding")), case.tensor("labels"), case.number("margin"))
    return indices(pairs, mined) | {"triplet_count": mined.sum()}


def check_ncm(case: Case) -> Values:
    return {"accuracy": ncm(case.tensor("embedding"), case.tensor("labels")) / 100}


def check_embedding(case: Case) -> Values:
    e_s, labels = case.leaf("student_embedding"), case.tensor("labels")
    s, t = said(e_s), said(case.tensor("teacher_embedding"))
    mode = "tuple" if "merged_anchor_index" in case else "triplet"
    config = REFILLED.Config(
        mode=mode, margin=case.number("margin"), tau=case.number("tau1"), init_beta=case.number("loss_scale")
    )
    method = REFILLED(setup_of(s, t, samples=4), config)
    found = semi_hard(distances(e_s.detach()), labels, method.hp.margin)
    loss = total(method.phases()[0].loss(s, t, batch_of(e_s, labels)))
    loss.backward()
    values = indices(*found) | (merged(*found) if mode == "tuple" else {})
    return {"loss": loss} | values | gradients({"student_embedding": e_s})


def check_classifier(case: Case) -> Values:
    e_t, labels, size = case.tensor("teacher_embedding"), case.tensor("labels"), case.integer("batch_size")
    z = case.tensor("logits_s")
    images = e_t[:, :, None, None]
    teacher = given(nn.Linear(e_t.shape[1], 2))
    setup = setup_of(said(e_t, z), teacher.features(images), teacher=teacher, samples=4)
    method = REFILLED(setup, REFILLED.Config(beta=case.number("lambd"), T=case.number("tau2")))
    phase = method.phases()[1]
    assert phase.before is not None
    batches = [batch_of(x, y) for x, y in zip(images.split(size), labels.split(size), strict=True)]
    phase.before(batches)
    values: Values = {"class_centers": method.centres.clone()}
    for i, (batch, z_s) in enumerate(zip(batches, z.split(size), strict=True)):
        leaf = z_s.clone().requires_grad_()
        terms = phase.loss(said(batch.images, leaf), teacher.features(batch.images), batch)
        loss = total(terms)
        loss.backward()
        parts = {"loss_ce": terms["ce"], "loss_teaching": terms["knowledge"]}
        values |= {f"batch{i}_{name}": term.weight * term.raw for name, term in parts.items()}
        values |= {f"batch{i}_loss": loss} | gradients({"logits_s": leaf}, f"batch{i}_")
    return values


ROWS = {
    "REFILLED mining": Row(("refilled",), check_mining),
    "NCM accuracy": Row(("refilled",), check_ncm),
    "REFILLED stage 1": Row(("refilled",), check_embedding),
    "REFILLED stage 2": Row(("refilled",), check_classifier),
}
