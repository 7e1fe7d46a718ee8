"""Checkers of AT, SP, CC, VID, RKD, PKT, NST and KDSVD."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pupil.methods import kdsvd, pkt, rkd, vid
from pupil.methods.at import AT
from pupil.methods.base import Method
from pupil.methods.cc import CC
from pupil.methods.kdsvd import KDSVD, Basis
from pupil.methods.nst import NST
from pupil.methods.pkt import PKT
from pupil.methods.rkd import RKD
from pupil.methods.sp import SP
from pupil.methods.vid import VID
from pupil.types import Features
from tests.reference.blocks import Row, Values, batch_of, setup_of, total
from tests.reference.golden import Case, gradients, module_results


def layers(case: Case, side: str) -> dict[str, Tensor]:
    names = sorted((n for n in case.meta["inputs"] if n.startswith(f"f{side}_")), key=lambda n: int(n[3:]))
    return {name: case.leaf(name) if side == "s" else case.tensor(name) for name in names}


def of_layers(tensors: list[Tensor], embed: bool = False) -> Features:
    """Features whose maps are the given ones; a vector at the end, or a single tensor with `embed`, is the embedding."""
    maps = tuple(x for x in tensors if x.dim() == 4 and not embed)
    assert all(x is y for x, y in zip(tensors, maps, strict=False)), "vectors come last"
    b, device = len(tensors[0]), tensors[0].device
    nothing = torch.zeros(b, 1, 1, 1, device=device)
    embedding = tensors[-1] if len(maps) < len(tensors) else torch.zeros(b, 1)
    return Features(nothing, maps, maps, maps[-1] if maps else nothing, embedding, torch.zeros(b, 2))


class Given:
    """The features of a case, and a method made for them with its own term alone."""

    def __init__(self, case: Case, cls: type[Method], embed: bool = False, **config: Any) -> None:
        self.leaves, teachers = layers(case, "s"), layers(case, "t")
        self.s, self.t = of_layers(list(self.leaves.values()), embed), of_layers(list(teachers.values()), embed)
        self.batch = batch_of(self.s.stem)
        alone: dict[str, Any] = {"ce": 0.0, "kl": 0.0, "beta": 1.0}
        self.method: Any = cls(setup_of(self.s, self.t), cls.Config(**alone | config))

    def results(self) -> Values:
        """The loss, that of every spot, and the gradients of the features."""
        m = self.method
        loss = total(m.loss(self.s, self.t, self.batch))
        loss.backward()
        spots = [m.match(i, *pair, self.batch) for i, pair in enumerate(m.compared(self.s, self.t))]
        return {"loss": loss} | {f"loss_{i}": x for i, x in enumerate(spots)} | gradients(self.leaves)


def check_at(case: Case) -> Values:
    return Given(case, AT, p=case.integer("p")).results()


def check_sp(case: Case) -> Values:
    return Given(case, SP, layers="all" if "fs_1" in case else "last").results()


def check_cc(case: Case) -> Values:
    given = Given(case, CC, embed=True, dim=case.integer("feat_dim"))
    modules: dict[str, nn.Module] = {"embed_s_linear": given.method.embed_s, "embed_t_linear": given.method.embed_t}
    case.load(modules)
    return given.results() | module_results(modules)


def check_vid(case: Case) -> Values:
    assert case.number("eps") == pytest.approx(vid.EPS), "the authors' constant"
    given = Given(case, VID, variance=case.number("init_pred_var"))
    modules: dict[str, nn.Module] = {}
    scales: dict[str, Tensor] = {}
    for i, (regress, scale) in enumerate(zip(given.method.regress, given.method.log_scale, strict=True)):
        torch.testing.assert_close(scale.detach(), case.tensor(f"layer{i}_log_scale_at_init"))
        convs = [m for m in regress if isinstance(m, nn.Conv2d)]
        modules |= {f"layer{i}_conv{j}": conv for j, conv in enumerate(convs)}
        scales[f"layer{i}_log_scale"] = scale
    case.load(modules)
    with torch.no_grad():
        for name, scale in scales.items():
            scale.copy_(case.tensor(name))
    return given.results() | module_results(modules) | gradients(scales)


def check_rkd(case: Case) -> Values:
    assert case.number("pdist_eps") == pytest.approx(rkd.SHORTEST**2), "the authors' constant"
    weights = {"distance": case.number("distance_weight"), "angle": case.number("angle_weight")}
    return Given(case, RKD, embed=True, **weights).results()


def check_pkt(case: Case) -> Values:
    assert case.number("eps") == pytest.approx(pkt.EPS), "the authors' constant"
    return Given(case, PKT, embed=True).results()


def check_nst(case: Case) -> Values:
    return Given(case, NST).results()


def check_kdsvd(case: Case) -> Values:
    return svd_values(case, "channels")


def check_kdsvd_mdistiller(case: Case) -> Values:
    return svd_values(case, "width")


def svd_values(case: Case, axis: str) -> Values:
    """Where the stored signs are LAPACK's, the teacher's vectors are given those before they are compared."""
    given = Given(case, KDSVD, k=case.integer("k"), axis=axis)
    method: KDSVD = given.method
    s, t = method.bases(given.s, given.t)
    stored = {
        f"{side}_{i}": case.tensor(f"{side}_right_singular_vectors_{i}")
        for side in ("student", "teacher")
        for i in range(len(s))
    }
    if not all((kdsvd.signs(v) == 1).all() for v in stored.values()):
        s = [like(basis, stored[f"student_{i}"]) for i, basis in enumerate(s)]
        t = [like(basis, stored[f"teacher_{i}"]) for i, basis in enumerate(t)]
        losses = method.relations(s, t)
        loss = torch.stack(losses).sum()
    else:
        losses = method.relations(s, t)
        loss = total(method.loss(given.s, given.t, given.batch))
    loss.backward()
    values: Values = {"loss": loss, **{f"loss_{i}": x for i, x in enumerate(losses)}, **gradients(given.leaves)}
    for side, bases in (("student", s), ("teacher", t)):
        for i, (singular, vectors) in enumerate(bases):
            values[f"{side}_right_singular_vectors_{i}"] = vectors
            values[f"{side}_singular_weights_{i}"] = nn.functional.normalize(singular)
    return values


def like(basis: Basis, stored: Tensor) -> Basis:
    """The vectors with the signs of the stored ones."""
    values, vectors = basis
    return values, vectors * (vectors.detach() * stored).sum(1, keepdim=True).sign()


ROWS = {
    "AT": Row(("at",), check_at),
    "SP": Row(("sp",), check_sp),
    "CC": Row(("cc",), check_cc),
    "VID": Row(("vid",), check_vid),
    "RKD": Row(("rkd",), check_rkd),
    "PKT": Row(("pkt",), check_pkt),
    "NST": Row(("nst",), check_nst),
    "KDSVD": Row(("kdsvd",), check_kdsvd),
    "KDSVD (mdistiller variant)": Row(("kdsvd",), check_kdsvd_mdistiller),
}
