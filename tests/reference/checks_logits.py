"""Checkers of methods on logits and embeddings: DKD, KDMSE and SRRL."""

import torch
from torch import Tensor, nn

from pupil.methods.dkd import DKD
from pupil.methods.kdmse import KDMSE
from pupil.methods.srrl import SRRL
from pupil.types import Features
from tests.reference.blocks import Row, Values, batch_of, given, linear, of_logits, said, setup_of, total
from tests.reference.golden import Case, gradients, module_results


def check_dkd(case: Case) -> Values:
    """Whole and in parts; with `warmup`, the objective of training at an epoch."""
    z_s, t = case.leaf("logits_s"), of_logits(case.tensor("logits_t"))
    trained = "warmup" in case
    config = DKD.Config(
        ce=case.number("ce_weight"),
        T=case.number("temperature"),
        alpha=case.number("alpha"),
        beta=case.number("beta"),
        warmup=case.integer("warmup") if trained else 1,
    )
    method = DKD(setup_of(of_logits(z_s), t), config)
    batch = batch_of(z_s, case.tensor("labels"))._replace(epoch=case.integer("epoch") if trained else 1)
    terms = method.loss(of_logits(z_s), t, batch)
    loss = total(terms)
    parts = {"target_class_part": terms["tckd"].raw, "nontarget_part": terms["nckd"].raw}
    values: Values = {"loss": loss} | {f"loss_{name}": part for name, part in parts.items()}
    if trained:
        values |= {"loss_ce": total({"ce": terms["ce"]}), "loss_kd": total({n: terms[n] for n in ("tckd", "nckd")})}
    for name, part in parts.items():
        (values[f"grad_logits_s_{name}"],) = torch.autograd.grad(part, z_s, retain_graph=True)
    loss.backward()
    return values | gradients({"logits_s": z_s})


def check_kdmse(case: Case) -> Values:
    z_s, t = case.leaf("logits_s"), of_logits(case.tensor("logits_t"))
    method = KDMSE(setup_of(of_logits(z_s), t), KDMSE.Config(ce=0.0))
    loss = total(method.loss(of_logits(z_s), t, batch_of(z_s)))
    loss.backward()
    return {"loss": loss} | gradients({"logits_s": z_s})


def check_srrl(case: Case) -> Values:
    e_s = case.leaf("fs_pooled")
    s, t = said(e_s), said(case.tensor("ft_pooled"), case.tensor("logits_t"))
    method = SRRL(setup_of(s, t, teacher=given(linear(case, "teacher_classifier"))), SRRL.Config(ce=0.0, kl=0.0))
    modules: dict[str, nn.Module] = {"connector_conv": method.connect[0], "connector_bn": method.connect[1]}
    case.load(modules)
    seen: dict[str, Tensor] = {}

    def see(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen["r" if module is method.connect else "z"] = out.flatten(1)

    method.connect.register_forward_hook(see)
    method.teacher_head.register_forward_hook(see)
    loss = total(method.loss(s, t, batch_of(e_s)))
    loss.backward()
    results = module_results(modules)  # before the parts, which are calls of their own
    values = {"transferred": seen["r"], "transferred_logits": seen["z"], "loss": loss} | gradients({"fs_pooled": e_s})
    return values | results | parts_of_srrl(method, s, t, seen)


def parts_of_srrl(method: SRRL, s: Features, t: Features, seen: dict[str, Tensor]) -> Values:
    """The loss with the other part's target met, so that one part is left."""
    batch = batch_of(s.embedding)
    feature = method.knowledge(s, t._replace(logits=seen["z"].detach()), batch)
    return {"loss_feature": feature, "loss_logit": method.knowledge(s, t._replace(embedding=seen["r"].detach()), batch)}


ROWS = {
    "DKD": Row(("dkd",), check_dkd),
    "KD-MSE": Row(("kdmse",), check_kdmse),
    "SRRL": Row(("srrl",), check_srrl),
}
