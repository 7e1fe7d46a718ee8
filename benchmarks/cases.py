"""What is measured: a method and its literal formula on the same features, each as a function that gives a loss."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.literal import crd_of
from benchmarks.literal_maps import LITERAL
from pupil.methods import METHODS
from pupil.methods.base import Method, Setup
from pupil.methods.crd import CRD
from pupil.methods.mlkd import both
from pupil.models import build
from pupil.net import Net, probe
from pupil.types import Batch, Features

GIVEN_ROWS = "crd, rows given"  # CRD without the drawing of its negatives
NAMES = [name for name in METHODS if name in LITERAL and name != "crd"] + [GIVEN_ROWS, "crd"]
SETTINGS: dict[str, dict[str, Any]] = {  # cross-entropy and KL, which all methods share, are left out where they can be
    **{name: {"ce": 0.0} for name in ("kd", "dkd", "nkd", "dist", "uskd", "mlkd")},
}
EPOCH = 3  # in the midst of every warm-up


class Size(NamedTuple):
    batch: int
    student: str = "resnet8x4"
    teacher: str = "resnet32x4"
    pixels: int = 32
    classes: int = 100
    images: int = 50_000  # of the training set, whose embeddings CRD keeps


class Case(NamedTuple):
    """`ours` and `literal` read the same leaves, `wrt`: the student's features and what the method trains beside it."""

    ours: Callable[[], Tensor]
    literal: Callable[[], Tensor]
    wrt: list[Tensor]
    method: Method


def case(name: str, size: Size, device: str = "cpu", **hp: Any) -> Case:
    row = "crd" if name == GIVEN_ROWS else name
    around, s, t, batch = scene(size, device, METHODS[row].two_views)
    torch.manual_seed(0)
    method = METHODS[row](around, METHODS[row].Config(**(SETTINGS.get(row, {}) | hp))).to(device).train()
    if row in ("ls", "ctkd"):
        inner: Any = method.inner
        inner.hp = replace(inner.hp, ce=0.0)
    s = Features(leaf(s.stem), tuple(map(leaf, s.maps)), tuple(map(leaf, s.pre)), *map(leaf, s[3:]))
    trained = [p for n, p in method.named_parameters() if not n.startswith(("student.", "inner.student."))]
    wrt = [s.stem, *s.maps, *s.pre, s.last, s.embedding, s.logits, *trained]
    if name == GIVEN_ROWS:
        assert isinstance(method, CRD)
        rows = torch.cat([batch.ids[:, None], method.negatives(batch.labels)], 1)
        ours = partial(method.contrast, s.embedding, t.embedding, rows, batch.ids)
        return Case(ours, partial(crd_of, method, s, t, batch, rows), wrt, method)
    return Case(partial(own_terms, row, method, s, t, batch), partial(LITERAL[row], method, s, t, batch), wrt, method)


@lru_cache(maxsize=4)
def scene(size: Size, device: str, two_views: bool) -> tuple[Setup, Features, Features, Batch]:
    """Untrained networks, random images and what the networks make of them."""
    torch.manual_seed(0)
    s_net, t_net = (build(net, size.classes).to(device) for net in (size.student, size.teacher))
    labels = (torch.arange(size.images) % size.classes).to(device)
    x, ids = torch.randn(size.batch, 3, size.pixels, size.pixels, device=device), torch.arange(size.batch, device=device)
    batch = Batch(x, labels[: size.batch], ids, EPOCH, x.flip(3))
    seen = probe(s_net, size.pixels), probe(t_net, size.pixels)
    around = Setup(s_net, t_net.requires_grad_(False).eval(), *seen, labels, size.batch)
    return around, features(s_net, batch, two_views), features(t_net, batch, two_views), batch


def features(net: Net, batch: Batch, two_views: bool) -> Features:
    """By the batch's own statistics, as those of an untrained network are no use.

    It says nearly the same of every image, so embeddings and logits are spread as a trained one's; otherwise losses would
    be what rounding leaves.
    """
    modes = net.training
    with torch.no_grad():
        f = net.train().features(batch.images)
        if two_views and batch.strong is not None:
            f = both(f, net.features(batch.strong))
    net.train(modes)
    return f._replace(embedding=spread(f.embedding).relu(), logits=4 * spread(f.logits))


def spread(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0).clamp(min=1e-6)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def own_terms(name: str, method: Method, s: Features, t: Features, batch: Batch) -> Tensor:
    """The method's term, without `beta`; of a method with terms of several kinds their weighted sum."""
    if name == "simkd":
        s = s._replace(last=method.student.neck(s.maps[-1]))
        t = t._replace(last=t.maps[-1])
    if (type(method).match, type(method).knowledge) != (Method.match, Method.knowledge):
        return method.knowledge(s, t, batch)
    return torch.stack([term.weight * term.raw for term in method.loss(s, t, batch).values()]).sum()


def step(loss: Callable[[], Tensor], wrt: list[Tensor]) -> Tensor:
    """Forward and backward; the gradients are left at the leaves."""
    for x in wrt:
        x.grad = None
    value = loss()
    value.backward()
    return value.detach()


@contextmanager
def unchanged(method: Method) -> Iterator[None]:
    """Afterwards banks and running statistics are as they were."""
    state = {key: value.clone() for key, value in method.state_dict().items()}
    try:
        yield
    finally:
        method.load_state_dict(state)


def disagreement(this: Case) -> tuple[float, float]:
    """Relative differences of ours from the literal formula: of the loss, and of what is furthest off.

    That is one of the gradients, or a buffer that a step changes: a memory bank, a running statistic.
    """
    found = []
    for loss in (this.ours, this.literal):
        with unchanged(this.method):
            value = step(loss, this.wrt).double()
            grads = [torch.zeros_like(x) if x.grad is None else x.grad.double() for x in this.wrt]
            left = [x.double().clone() for x in this.method.buffers()]
        found.append((value, grads, left))
    (value, grads, left), (value_l, grads_l, left_l) = found
    whole = torch.stack([g.norm() for g in grads_l]).max()
    off = [(a - b).norm() / b.norm().clamp(min=1e-6 * whole) for a, b in zip(grads, grads_l, strict=True)]
    off += [(a - b).norm() / b.norm().clamp(min=1e-6) for a, b in zip(left, left_l, strict=True)]
    assert whole > 0, "the loss reaches the student"
    return ((value - value_l).abs() / value_l.abs()).item(), torch.stack(off).max().item()
