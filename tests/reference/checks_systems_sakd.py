"""Checkers of SAKD: gates, adapters, classifiers on maps, and whole iterations of routing."""

import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pupil.methods.adapters import regressor
from pupil.methods.cc import CC
from pupil.methods.fitnet import FitNet
from pupil.methods.midway import Hierarchy, MidClassifiers, Midway
from pupil.methods.routing import EPS, TEACHER, lean_to_teacher, relaxed, straight_through
from pupil.methods.sakd import SAKD, Agent
from pupil.models import NETWORKS
from pupil.net import Net, probe
from pupil.types import Batch
from tests.reference.blocks import Row, Values, batch_of, said, setup_of, total
from tests.reference.golden import Case, gradients, listings, module_results
from tests.reference.test_models import ours, weight

REPO = "spot-adaptive-pytorch"
Parts = list[tuple[str, Tensor]]  # the authors' names and our tensors

# --- the policy ---------------------------------------------------------------------------------------------------------


def check_gumbel(case: Case) -> Values:
    assert case.number("eps") == pytest.approx(EPS), "the authors' constant"
    scores = case.leaf("policy_logits")
    soft = relaxed(scores, case.tensor("uniform_noise"), case.number("temperature"))
    action = straight_through(soft)
    (action * case.tensor("upstream")).sum().backward()
    values = {"soft": soft, "action": action, "route_to_teacher": action[..., TEACHER] > 0.5}
    return values | gradients({"policy_logits": scores})


def check_lean(case: Case) -> Values:
    gates, width = case.arrays["policy_weight"].shape
    layer = nn.Linear(width, gates)
    case.load({"policy": layer})
    lean_to_teacher(layer)
    return {"policy_bias_after": layer.bias}


# --- adapters and classifiers -------------------------------------------------------------------------------------------


def check_adapter(case: Case) -> Values:
    """As FitNet's regressor."""
    f_s, f_t = case.leaf("fs_0"), case.tensor("ft_0")
    method = FitNet(setup_of(said(f_s), said(f_t)), FitNet.Config(ce=0.0, beta=1.0, hint=1))
    method.regress = regressor(f_s.shape, f_t.shape, grow=True, deep="regressor_conv2_weight" in case)
    names = ("conv", "bn", None, "conv2", "bn2", None)
    modules = {f"regressor_{name}": m for name, m in zip(names, method.regress, strict=False) if name is not None}
    case.load(modules)
    regressed: list[Any] = []
    method.regress.register_forward_hook(lambda module, args, out: regressed.append(out))
    loss = total(method.loss(said(f_s), said(f_t), batch_of(f_s)))
    loss.backward()
    return {"regressed_fs_0": regressed[0], "loss": loss} | gradients({"fs_0": f_s}) | module_results(modules)


def midway(case: Case, module: Midway, taps: list[Tensor], logits_t: Tensor, labels: Tensor) -> Values:
    heads = {f"classifier_layer{spot}": head for spot, head in module.heads.items()}
    case.load(heads)
    loss = module(taps, logits_t, labels)
    loss.backward()
    scores = {f"scores_{spot}": z for spot, z in module.scores(taps).items()}
    return {"loss": loss} | scores | gradients({f"fs_{i}": f for i, f in enumerate(taps)}) | module_results(heads)


def maps(case: Case) -> list[Tensor]:
    return [case.leaf(f"fs_{i}") for i in range(sum(name.startswith("fs_") for name in case.arrays))]


def check_mid(case: Case) -> Values:
    taps, logits_t = maps(case), case.tensor("logits_t")
    found = zip(case.tensor("layer_indices").tolist(), case.tensor("layer_temperatures").tolist(), strict=True)
    module = MidClassifiers({i: f.shape[1] for i, f in enumerate(taps)}, dict(found), logits_t.shape[1])
    return midway(case, module, taps, logits_t, torch.zeros(len(logits_t), dtype=torch.int64))


def check_hierarchy(case: Case) -> Values:
    taps, labels = maps(case), case.tensor("labels")
    of_class = {int(n.removeprefix("clusters_layer")): a for n, a in case.arrays.items() if n.startswith("clusters_layer")}
    clusters = {i: [np.flatnonzero(a == c).tolist() for c in range(a.max() + 1)] for i, a in of_class.items()}
    module = Hierarchy({i: f.shape[1] for i, f in enumerate(taps)}, clusters)
    return midway(case, module, taps, torch.empty(0), labels)


# --- routing ------------------------------------------------------------------------------------------------------------


def network(case: Case, role: str) -> tuple[Net, Parts]:
    """Teacher or student, filled by the rule of the README, and its parameters by the authors' names."""
    constructor, suffix = str(case.arrays[role]), str(case.arrays["weight_key_suffix"])
    name = ours(REPO, constructor)
    assert name is not None, f"no network {constructor}"
    net, rename = NETWORKS[name](case.integer("num_classes")), sys.modules[NETWORKS[name].__module__].published_key
    folders = (case.path.parent, Path(__file__).parents[1] / "golden")
    rows = [row for folder in folders for row in listings(folder / "models.json")]
    own_rows = [r for r in rows if (r["repo"], r["constructor"]) == (REPO, constructor)]
    alike = [r for r in rows if ours(r["repo"], r["constructor"]) == name]  # of the same keys
    keys = {key: rename(key) for key, *_ in [*own_rows, *alike][0]["state_dict"]}
    own = net.state_dict()
    given = {k: weight(theirs, tuple(own[k].shape), f"{role}.{theirs}{suffix}") for theirs, k in keys.items()}
    net.load_state_dict(given)
    parameters = dict(net.named_parameters())
    return net, [(f"{role}.{theirs}", parameters[k]) for theirs, k in keys.items() if k in parameters]


def fill(case: Case, named: Iterable[tuple[str, nn.Module]]) -> Parts:
    """Fills modules by the rule; their parameters by the authors' names."""
    found: Parts = []
    for prefix, module in named:
        own = module.state_dict()
        texts = {key: f"{prefix}.{key}" for key in own}
        suffix = str(case.arrays["weight_key_suffix"])
        module.load_state_dict({k: weight(text, tuple(own[k].shape), text + suffix) for k, text in texts.items()})
        found += [(f"{prefix}.{key}", p) for key, p in module.named_parameters()]
    return found


def agent_parts(case: Case, agent: Agent) -> Parts:
    several, found = len(agent.crossing.to_teacher) > 1, []
    for k, pair in enumerate(zip(agent.crossing.to_teacher, agent.crossing.to_student, strict=True)):
        for name, module in zip(("hint", "anti_hint"), pair, strict=True):
            prefix = f"{name}_{k}" if several else name
            if isinstance(module, nn.Sequential):
                found += [(f"{prefix}.conv", module[0]), (f"{prefix}.bn", module[1])]
            else:
                found.append((f"{prefix}.net", module))
    return fill(case, [*found, ("policy.net", agent.policy.net)])


def loss_parts(case: Case, inner: Any) -> Parts:
    """The wrapped method's own modules."""
    if isinstance(inner, FitNet):
        return fill(case, [("loss_hint.conv", inner.regress[0]), ("loss_hint.bn", inner.regress[1])])
    if isinstance(inner, CC):
        return fill(case, [("cc_embed_s.linear", inner.embed_s), ("cc_embed_t.linear", inner.embed_t)])
    found: Parts = []
    for i, scale in enumerate(getattr(inner, "log_scale", ())):
        text = f"vid.{i}.log_scale"
        scale.data.copy_(weight(text, tuple(scale.shape), text + str(case.arrays["weight_key_suffix"])))
        found += [(text, scale), *fill(case, [(f"vid.{i}.regressor", inner.regress[i])])]
    return found


def routed_method(case: Case) -> tuple[SAKD, Parts, Parts]:
    """The method, and what the main optimiser and the agent's train."""
    (student, of_student), (teacher, _) = network(case, "student"), network(case, "teacher")
    size = case.arrays["images"].shape[-1]
    setup = setup_of(probe(student, size), probe(teacher, size), student, teacher, samples=len(case.arrays["labels"]))
    config = SAKD.Config(
        of=str(case.arrays["method"]).lower(),
        gamma=case.number("gamma"),
        T=case.number("temperature"),
        tau=case.number("gumbel_temperature"),
    )
    method = SAKD(setup, config)
    if isinstance(method.inner, CC):
        dim = re.search(r"(\d+)-d embedding", case.meta["description"])
        method.inner = CC(setup, replace(method.inner.hp, **({} if dim is None else {"dim": int(dim[1])})))
    method.inner.hp = replace(method.inner.hp, kl=case.number("alpha"), beta=case.number("beta"))
    assert method.agent is not None
    return method, [*of_student, *loss_parts(case, method.inner)], agent_parts(case, method.agent)


def summary(parts: Parts, names: list[str]) -> Tensor:
    """Sum, norm and first element of each gradient; zeros where the loss does not reach."""
    by_name = dict(parts)
    grads = [torch.zeros(1) if (g := by_name[name].grad) is None else g for name in names]
    return torch.stack([torch.stack([g.sum(), g.norm(), g.flatten()[0]]) for g in grads])


def names_of(case: Case, output: str, parts: Parts) -> list[str]:
    """In the order of the vector, where the names are the same."""
    order = {str(name): i for i, name in enumerate(case.arrays[output])}
    return sorted((name for name, _ in parts), key=lambda name: order.get(name, len(order)))


def decisions(case: Case, scores: Tensor) -> Tensor:
    """(B, gates, 2): those given, or sampled with the given noise."""
    if "decisions" in case:
        return F.one_hot(1 - case.tensor("decisions"), 2).float().requires_grad_()
    return straight_through(relaxed(scores, case.tensor("uniform_noise"), case.number("gumbel_temperature")))


def check_routing(case: Case) -> Values:
    """Both of the authors' updates by one backward pass, as in `fit`."""
    method, main, ours_of_agent = routed_method(case)
    agent, student, teacher = method.agent, method.student, method.teacher
    assert agent is not None
    images, labels = case.tensor("images"), case.tensor("labels")
    batch = Batch(images, labels, torch.arange(len(labels)))
    with torch.no_grad():
        t = teacher.features(images)
        method.eval()
        alone_s = student.features(images)
        statistics = {key: value.clone() for key, value in method.state_dict().items()}
        e_s = method.train().student.features(images).embedding
        method.load_state_dict(statistics)
    scores = agent.policy.scores(e_s, t.embedding)
    taken, in_eval = decisions(case, scores), decisions(case, agent.policy.scores(alone_s.embedding, t.embedding))
    gates = taken[..., TEACHER]
    with torch.no_grad():
        method.eval()
        routed_in_eval = agent.crossing(student, teacher, images, in_eval[..., TEACHER])
        method.train()
    heard: list[Any] = []
    agent.crossing.register_forward_hook(lambda module, args, out: heard.append(out))
    s = student.features(images)
    terms = method.routed_by(gates, s, t, batch)
    total(terms).backward()
    (routed,) = heard
    main_names, agent_names = (names_of(case, f"{n}_grad_names", p) for n, p in (("main", main), ("agent", ours_of_agent)))
    last, constructor = str(case.arrays["student_last_bn_key"]), str(case.arrays["student"])
    rename = sys.modules[NETWORKS[ours(REPO, constructor) or ""].__module__].published_key
    values: Values = {
        "routed_logits_eval_mode": routed_in_eval,
        "student_logits_eval_mode": alone_s.logits,
        "teacher_logits_eval_mode": t.logits,
        "routed_logits": routed,
        "logits_s": s.logits,
        "logits_t": t.logits,
        "loss_routed_total": terms["agent"].raw,
        "loss_routed_ce": F.cross_entropy(routed, labels),
        "loss_student_ce": terms["ce"].raw,
        "loss_div_weighted": terms["kl"].weight * terms["kl"].raw,
        "loss_kd_unweighted": terms["knowledge"].raw,
        "loss_total": total({name: term for name, term in terms.items() if name != "agent"}),
        "decisions_used": (gates > 0.5).float(),
        "policy_logits": scores.flatten(1),
        "agent_grad_names": np.array(agent_names),
        "main_grad_names": np.array(main_names),
        "agent_grad_summary": summary(ours_of_agent, agent_names),
        "main_grad_summary": summary(main, main_names),
        "student_last_bn_key": case.arrays["student_last_bn_key"],
        "student_last_bn_running_mean_after": student.get_buffer(rename(last)),
    }
    return values | ({"grad_decisions": taken.grad} if "decisions" in case else {})


ROWS = {
    "SAKD routing": Row(("sakd",), check_routing),
    "policy sampling": Row(("sakd",), check_gumbel),
    "policy initialisation": Row(("sakd",), check_lean),
    "regressor (SAKD variant)": Row(("sakd",), check_adapter),
    "mid-classifier loss": Row(("sakd",), check_mid),
    "hierarchical loss": Row(("sakd",), check_hierarchy),
}
