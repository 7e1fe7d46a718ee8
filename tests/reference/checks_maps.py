"""Checkers of AB, FT, FSP, OFD, ReviewKD and SemCKD."""

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pupil.methods.ab import AB
from pupil.methods.fsp import FSP, flow
from pupil.methods.ft import FT, SLOPE
from pupil.methods.ofd import OFD
from pupil.methods.reviewkd import Fusion, ReviewKD
from pupil.methods.semckd import SemCKD
from pupil.net import Net, Stage
from pupil.types import Features
from tests.reference.blocks import Row, Values, batch_of, said, setup_of, total
from tests.reference.golden import Case, gradients, module_results


def tensors(case: Case, prefix: str) -> dict[str, Tensor]:
    """The inputs <prefix>0, <prefix>1, ... by name; those of the student want gradients."""
    names = [n for n in case.meta["inputs"] if re.fullmatch(rf"{prefix}\d+", n)]
    names.sort(key=lambda n: int(n.removeprefix(prefix)))
    return {n: case.leaf(n) if prefix.startswith("fs") else case.tensor(n) for n in names}


def of_maps(maps: Sequence[Tensor], pre: Sequence[Tensor] | None = None, **others: Tensor) -> Features:
    """Features with these maps, the first of which is the stem; what else is known of them by name."""
    pre = maps if pre is None else pre
    b = len(maps[0])
    f = Features(maps[0], tuple(maps[1:]), tuple(pre[1:]), maps[-1], torch.zeros(b, 1), torch.zeros(b, 2))
    return f._replace(**others)


def recorded(*modules: nn.Module) -> list[Tensor]:
    """What the modules will give, in the order of their calls."""
    seen: list[Tensor] = []

    def record(module: nn.Module, args: Any, out: Any) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)

    for module in modules:
        module.register_forward_hook(record)
    return seen


def check_ab(case: Case) -> Values:
    leaves, targets = tensors(case, "fs_"), tensors(case, "ft_")
    nothing = torch.zeros(len(case.arrays["fs_0"]), 1, 1, 1)
    s, t = (of_maps([nothing, *maps.values()]) for maps in (leaves, targets))
    method = AB(setup_of(s, t), AB.Config(margin=case.number("margin")))
    modules: dict[str, nn.Module] = {}
    for i, connector in enumerate(method.connectors):
        if not isinstance(connector, nn.Identity):
            conv, norm = connector.children()
            modules |= {f"connector{i}_conv": conv, f"connector{i}_bn": norm}
    case.load(modules)
    connected, batch = recorded(*method.connectors), batch_of(s.stem)
    loss = total(method.warm_up(s, t, batch))
    loss.backward()
    parts = [method.match(i, *pair, batch) for i, pair in enumerate(zip(connected, t.pre, strict=True))]
    values = {f"loss_{i}": part for i, part in enumerate(parts)} | {f"connected_fs_{i}": f for i, f in enumerate(connected)}
    return values | {"loss": loss} | gradients(leaves) | module_results(modules)


def check_fsp(case: Case) -> Values:
    leaves = tensors(case, "fs_")
    s, t = of_maps([*leaves.values()]), of_maps([*tensors(case, "ft_").values()])
    loss = total(FSP(setup_of(s, t), FSP.Config()).warm_up(s, t, batch_of(s.stem)))
    loss.backward()
    flows = [[flow(*pair) for pair in zip(f.taps[:-2], f.taps[1:-1], strict=True)] for f in (s, t)]
    parts = {f"loss_{i}": (a - b).square().mean() for i, (a, b) in enumerate(zip(*flows, strict=True))}
    return parts | {"loss": loss} | gradients(leaves)


def check_ft(case: Case) -> Values:
    """The first phase where the vector has a decoder, else the second."""
    assert case.number("negative_slope") == pytest.approx(SLOPE), "the authors' constant"
    f_t = case.tensor("ft_0")
    first = "paraphraser_decoder_deconv0_weight" in case
    f_s = torch.zeros(len(f_t), 1, 1, 1) if first else case.leaf("fs_0")
    s, t = said(f_s), said(f_t)
    config = FT.Config(ce=0.0, beta=1.0, k=case.number("compression_k"))
    if not first:
        config = replace(config, p1=case.integer("p1"), p2=case.integer("p2"))
    method = FT(setup_of(s, t), config)
    encode, decode = method.paraphraser["encode"], method.paraphraser["decode"]
    ours: dict[str, nn.Module] = {}
    for name, module in (
        ("paraphraser_encoder", encode),
        ("paraphraser_decoder", decode),
        ("translator_encoder", method.translate),
    ):
        for kind, cls in (("conv", nn.Conv2d), ("deconv", nn.ConvTranspose2d), ("bn", nn.BatchNorm2d)):
            ours |= {f"{name}_{kind}{i}": m for i, m in enumerate(m for m in module.children() if isinstance(m, cls))}
    used = {name: m for name, m in ours.items() if f"{name}_weight" in case}
    case.load(used)
    factor_s, factor_t, again = recorded(method.translate), recorded(encode), recorded(decode)
    if first:
        loss = total(method.warm_up(s, t, batch_of(f_s)))
        loss.backward()
        return {"loss": loss, "factor": factor_t[0], "reconstruction": again[0]} | module_results(used)
    loss = total(method.loss(s, t, batch_of(f_s)))
    loss.backward()
    values = {"loss": loss, "factor_s": factor_s[0], "factor_t": factor_t[0]}
    return values | gradients({"fs_0": f_s}) | module_results(used)


def check_ofd(case: Case) -> Values:
    leaves, targets, z = tensors(case, "fs_preact_"), tensors(case, "ft_preact_"), case.leaf("logits_s")
    s, t = of_maps([*leaves.values()], logits=z), of_maps([*targets.values()])
    norms = [nn.BatchNorm2d(f.shape[1]) for f in t.pre]
    for i, norm in enumerate(norms):
        norm.weight.data, norm.bias.data = case.tensor(f"teacher_bn{i}_weight"), case.tensor(f"teacher_bn{i}_bias")
    teacher = Net(nn.Identity(), [Stage(norm, act=nn.ReLU()) for norm in norms], nn.Linear(1, 1))
    config = OFD.Config(ce=case.number("ce_weight"), beta=case.number("feat_weight"), kernel=case.integer("kernel_size"))
    method = OFD(setup_of(s, t, teacher=teacher), config)
    modules: dict[str, nn.Module] = {}
    for i, connector in enumerate(method.connectors):
        conv, norm = connector.children()
        modules |= {f"connector{i}_conv": conv, f"connector{i}_bn": norm}
    case.load(modules)
    terms = method.loss(s, t, batch_of(s.stem, case.tensor("labels")))
    total(terms).backward()
    values = {"loss_ce": total({"": terms["ce"]}), "loss_kd": total({"": terms["knowledge"]}), "loss": total(terms)}
    values |= {f"margin_{i}": method.get_buffer(f"margin_{i}") for i in range(len(norms))}
    return values | gradients(leaves | {"logits_s": z}) | module_results(modules)


def check_reviewkd(case: Case) -> Values:
    after, before = tensors(case, "fs_"), tensors(case, "fs_preact_")
    e, z = case.leaf("fs_pooled"), case.leaf("logits_s")
    targets = [*tensors(case, "ft_preact_").values()]
    s = of_maps([*after.values()], [*before.values()], embedding=e, logits=z)
    t = of_maps(targets, embedding=case.tensor("ft_pooled"), logits=case.tensor("logits_t"))
    config = ReviewKD.Config(
        ce=case.number("ce_weight"),
        beta=case.number("review_weight"),
        warm_up=case.integer("warmup_epochs"),
        before_relu=bool(case.arrays["use_student_preact"]),
    )
    method = ReviewKD(setup_of(s, t), config)
    modules: dict[str, nn.Module] = {}
    for k, fusion in enumerate(method.fusions):
        assert isinstance(fusion, Fusion)
        for i, layers in ((1, fusion.enter), (2, fusion.leave)):
            modules |= {f"fuse{k}_conv{i}": layers[0], f"fuse{k}_bn{i}": layers[1]}
        if fusion.attend is not None:
            modules[f"fuse{k}_attention"] = fusion.attend
    case.load(modules)
    fused = recorded(*method.fusions)
    batch = batch_of(s.stem, case.tensor("labels"))._replace(epoch=case.integer("epoch"))
    terms = method.loss(s, t, batch)
    total(terms).backward()
    values = {"loss_ce": total({"": terms["ce"]}), "loss_kd": total({"": terms["knowledge"]}), "loss": total(terms)}
    values |= {f"fused_{i}": f for i, f in enumerate(reversed(fused))}
    return values | gradients(after | before | {"fs_pooled": e, "logits_s": z}) | module_results(modules)


def check_semckd(case: Case) -> Values:
    leaves, targets = tensors(case, "fs_"), tensors(case, "ft_")
    b = len(case.arrays["fs_0"])
    nothing = torch.zeros(b, 1, 1, 1)
    s, t = (of_maps([nothing, *maps.values()]) for maps in (leaves, targets))
    config = SemCKD.Config(ce=0.0, kl=0.0, beta=1.0, soft=case.number("soft"), factor=case.integer("factor"))
    method = SemCKD(replace(setup_of(s, t, samples=b), batch_size=b), config)
    modules: dict[str, nn.Module] = {}
    for name, embeddings in (("query", method.queries), ("key", method.keys)):
        for i, (one, _, two) in ((i, m.children()) for i, m in enumerate(embeddings)):
            modules |= {f"{name}_{i}_linear1": one, f"{name}_{i}_linear2": two}
    for i, row in enumerate(method.project):
        for j, projection in enumerate(row.children()):
            for kind, cls in (("conv", nn.Conv2d), ("bn", nn.BatchNorm2d)):
                found = (m for m in projection.children() if isinstance(m, cls))
                modules |= {f"proj_s{i}_t{j}_{kind}{n}": m for n, m in enumerate(found)}
    case.load(modules)
    again = copy.deepcopy(method)
    loss = total(method.loss(s, t, batch_of(s.stem)))
    loss.backward()
    values = {"loss": loss, "attention": again.attend(s, t), "pair_mse": again.differences(s, t)}
    torch.testing.assert_close(method.observed()["attention"], values["attention"].mean(0))
    return values | gradients(leaves) | module_results(modules)


ROWS = {
    "AB": Row(("ab",), check_ab),
    "FT": Row(("ft",), check_ft),
    "FSP": Row(("fsp",), check_fsp),
    "OFD": Row(("ofd",), check_ofd),
    "ReviewKD": Row(("reviewkd",), check_reviewkd),
    "SemCKD": Row(("semckd",), check_semckd),
}
