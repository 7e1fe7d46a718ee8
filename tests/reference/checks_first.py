"""Checkers of KD, FitNet, SimKD, CRD and TH-KD."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pupil.methods.contrast import Contrast, unit
from pupil.methods.crd import CRD
from pupil.methods.fitnet import FitNet
from pupil.methods.functions import same_size
from pupil.methods.kd import KD
from pupil.methods.simkd import SimKD
from pupil.methods.thkd import THKD
from pupil.net import FrozenLinear
from pupil.types import Features
from tests.reference.blocks import Row, Values, batch_of, given, linear, of_logits, said, setup_of, total
from tests.reference.golden import Case, gradients, module_results


def check_kd(case: Case) -> Values:
    z_s, z_t = case.leaf("logits_s"), case.tensor("logits_t")
    s, t = of_logits(z_s), of_logits(z_t)
    batch = batch_of(z_s, case.tensor("labels") if "labels" in case else None)
    T = case.number("temperature")
    weights = {"ce": case.number("gamma", 0.0), "kl": case.number("alpha", 1.0)}
    loss = total(KD(setup_of(s, t), KD.Config(**weights, T=T)).loss(s, t, batch))
    loss.backward()
    parts = KD(setup_of(s, t), KD.Config(ce=1.0, kl=1.0, T=T)).loss(s, t, batch)
    return {"loss": loss, "loss_cls": parts["ce"].raw, "loss_div": parts["kl"].raw} | gradients({"logits_s": z_s})


def check_fitnet(case: Case) -> Values:
    f_s, f_t = case.leaf("fs_0"), case.tensor("ft_0")
    s, t = said(f_s), said(f_t)
    method = FitNet(setup_of(s, t), FitNet.Config(ce=0.0, beta=1.0, hint=1))
    modules = {"regressor_conv": method.regress[0], "regressor_bn": method.regress[1]}
    case.load(modules)
    regressed: list[Tensor] = []
    method.regress.register_forward_hook(lambda module, args, out: regressed.append(out))
    loss = total(method.loss(s, t, batch_of(f_s)))
    loss.backward()
    (out,) = regressed
    values = {"regressed_fs_0": out, "target_used": same_size(out, f_t)[1], "loss": loss}
    return values | gradients({"fs_0": f_s}) | module_results(modules)


def check_simkd(case: Case) -> Values:
    f_s, f_t = case.leaf("fs_0"), case.tensor("ft_0")
    student, teacher = given(nn.Linear(f_s.shape[1], 2)), given(linear(case, "teacher_classifier"))
    t = teacher.features(f_t)
    setup = setup_of(student.features(f_s), t, student, teacher)
    method = SimKD(setup, SimKD.Config(ce=1.0, beta=1.0, factor=case.integer("factor")))
    layers = list(method.student.neck.children())
    convs = [m for m in layers if isinstance(m, nn.Conv2d)]
    norms = [m for m in layers if isinstance(m, nn.BatchNorm2d)]
    modules: dict[str, nn.Module] = {f"projector_conv{i}": m for i, m in enumerate(convs)}
    modules |= {f"projector_bn{i}": m for i, m in enumerate(norms)}
    case.load(modules)
    assert isinstance(method.student.head, FrozenLinear)
    logits_eval = method.eval().student(f_s)
    s = method.train().student.features(f_s)
    terms = method.loss(s, t, batch_of(f_s, case.tensor("labels")))
    loss = terms["knowledge"].weight * terms["knowledge"].raw
    loss.backward()
    values = {
        "projected": s.last,
        "target_used": same_size(s.last, t.last)[1],
        "logits_through_teacher_classifier": s.logits,
        "logits_eval_mode": logits_eval,
        "loss": loss,
        "ce_of_projected_logits": terms["ce"].raw,
    }
    return values | gradients({"fs_0": f_s}) | module_results(modules)


def crd_of(case: Case, f_s: Tensor, f_t: Tensor) -> tuple[CRD, dict[str, nn.Module]]:
    assert case.number("eps") == pytest.approx(1e-7), "the authors' constant"
    n, k, dim = case.integer("n_data"), case.integer("nce_k"), case.integer("feat_dim")
    config = CRD.Config(ce=0.0, beta=1.0, dim=dim, k=k, tau=case.number("nce_t"), momentum=case.number("nce_m"))
    method = CRD(setup_of(said(f_s), said(f_t), samples=n), config)
    modules: dict[str, nn.Module] = {"embed_s_linear": method.embed_s, "embed_t_linear": method.embed_t}
    case.load(modules)
    with torch.no_grad():
        method.bank_s.copy_(case.tensor("memory_v1_before"))
        method.bank_t.copy_(case.tensor("memory_v2_before"))
    return method, modules


def banks_and_Z(method: Contrast) -> Values:
    values = {"Z_s": method.Z[0], "Z_t": method.Z[1], "memory_v1_after": method.bank_s, "memory_v2_after": method.bank_t}
    return {name: value.clone() for name, value in values.items()}


def check_crd(case: Case) -> Values:
    """Successive calls of one module; each has its own features, ids and negatives."""
    calls = sorted(m[1] for m in (re.fullmatch(r"((?:call\d+_)?)fs", name) for name in case.meta["inputs"]) if m)
    values: Values = {}
    method, modules = crd_of(case, case.tensor(f"{calls[0]}fs"), case.tensor(f"{calls[0]}ft"))
    for call in calls:
        f_s, f_t = case.leaf(f"{call}fs"), case.tensor(f"{call}ft")
        rows = case.tensor(f"{call}contrast_idx")
        assert torch.equal(rows[:, 0], case.tensor(f"{call}idx"))
        before = copy.deepcopy(method)
        method.zero_grad()
        loss = method.contrast(f_s, f_t, rows)
        loss.backward()
        with torch.no_grad():
            v_s, v_t = unit(before.embed_s(f_s)), unit(before.embed_t(f_t))
            found = {
                "embedded_s": v_s,
                "embedded_t": v_t,
                "loss_s": before.nce(0, v_s, before.bank_t, rows),
                "loss_t": before.nce(1, v_t, before.bank_s, rows),
                "scores_s": before.probabilities(0, v_s, before.bank_t, rows),
                "scores_t": before.probabilities(1, v_t, before.bank_s, rows),
                "loss": loss,
            }
        values |= {f"{call}{name}": value for name, value in (found | banks_and_Z(method)).items()}
        values |= gradients({"fs": f_s}, call) | module_results(modules, call)
    return values


def thkd_of(case: Case, e_s: Tensor, config: THKD.Config) -> tuple[THKD, Features, Tensor]:
    """The method, the teacher's features and the images whose embeddings are the given ones."""
    teacher = given(linear(case, "teacher_head"))
    t = said(case.tensor("ft_embedding"), case.tensor("logits_t"))
    student = given(linear(case, "student_head"))
    images = e_s[:, :, None, None]
    return THKD(setup_of(student.features(images), t, student, teacher), config), t, images


def check_kdth(case: Case) -> Values:
    e_s = case.leaf("fs_embedding")
    method, t, images = thkd_of(case, e_s, THKD.Config(ce=0.0, kl=0.0, beta=1.0, T_head=case.number("temperature")))
    s = method.student.features(images)
    loss = total(method.loss(s, t, batch_of(images)))
    loss.backward()
    head = method.teacher_head
    values = {
        "logits_student_head": s.logits,
        "logits_teacher_head": head(s.embedding),
        "loss": loss,
        "teacher_head_requires_grad": any(x.requires_grad for x in (head.weight, head.bias)),
    }
    return values | gradients({"fs_embedding": e_s}) | module_results({"student_head": method.student.head})


def check_two_heads(case: Case) -> Values:
    method, _, images = thkd_of(case, case.tensor("fs_embedding"), THKD.Config(mix=case.number("validation_th_weight")))
    net = method.student.eval()
    f, out = net.features(images), net(images)
    values = {
        "logits_student_head": f.logits,
        "plain_forward_logits": method(batch_of(images), f, lambda s, t, batch: s.logits),
        "logits_teacher_head": method.teacher_head(f.embedding),
        "combined_probabilities": F.softmax(out, 1),  # of log-probabilities: themselves
        "trainable_parameter_count": sum(p.numel() for g in method.phases()[0].train for p in g.module.parameters()),
    }
    net.head.load_state_dict(method.teacher.head.state_dict())
    return values | {"logits_student_head_after_init_from_teacher": net.features(images).logits}


ROWS = {
    "KD": Row(("kd",), check_kd),
    "FitNet hint": Row(("fitnet",), check_fitnet),
    "hint (SimKD variant)": Row(("fitnet",), check_fitnet),
    "SimKD": Row(("simkd",), check_simkd),
    "CRD": Row(("crd",), check_crd),
    "KD-TH": Row(("thkd",), check_kdth),
    "TH wrapper": Row(("thkd",), check_two_heads),
}
