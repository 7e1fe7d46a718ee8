"""What goes with what: every method in every situation, tried and not declared.

A trial is one real training step of each phase with tiny networks; where it is refused, the refusal is the reason.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from pupil.assemble import crosses_tasks, refuse_other_classes
from pupil.fit import activate, step, teacher_features
from pupil.kept import refuse_readers
from pupil.methods import METHODS
from pupil.methods.base import Method, Setup
from pupil.methods.contrast import Contrast
from pupil.models import build
from pupil.net import FrozenLinear, Net, cut, probe
from pupil.optim import Optim, make_optimizer
from pupil.types import Batch, UserError

CLASSES, MORE, SIZE, IMAGES = 4, 6, 16, 8
SMALL: dict[str, Any] = {"dim": 8, "init_epochs": 1}  # where a method has such settings


@dataclass(frozen=True)
class Situation:
    """How a method is used."""

    name: str
    about: str
    teacher: Callable[[], Net] = lambda: build("resnet14", CLASSES)
    other_classes: bool = False
    hp: dict[str, Any] = field(default_factory=dict)
    wrapper: str | None = None
    optimizer: str = "sgd"
    views: int | None = None


def under_a_students_classifier() -> Net:
    net = build("resnet14", CLASSES)
    net.head = FrozenLinear.of(build("resnet8", CLASSES).head)
    return net


def of_more_classes() -> Net:
    net = build("resnet14", MORE)
    cut(net, range(CLASSES))
    return net


def without_maps() -> Net:
    layers = nn.Conv2d(3, 64, 3, 2, bias=False), nn.BatchNorm2d(64), nn.ReLU()
    net = Net(nn.Sequential(*layers), [], nn.Linear(64, CLASSES))
    net.name = "without stages"
    return net


SITUATIONS = (
    Situation("sh-kd", "a teacher retrained under the student's classifier (shkd)", under_a_students_classifier),
    Situation(
        "subset", "the student knows some of the teacher's classes (data.classes, data.teacher_classes)", of_more_classes
    ),
    Situation("task", "the teacher knows other classes (data.overlap)", lambda: build("resnet14", MORE), other_classes=True),
    Situation("width", "embeddings of other width: resnet8 from resnet8x4", lambda: build("resnet8x4", CLASSES)),
    Situation("family", "another family, with other maps: resnet8 from vgg8", lambda: build("vgg8", CLASSES)),
    Situation("no maps", "a teacher that gives an embedding and logits alone", without_maps),
    Situation("init", "the student's classifier starts as the teacher's (hp.METHOD.head=init)", hp={"head": "init"}),
    Situation("frozen", "the student's classifier is the teacher's (hp.METHOD.head=frozen)", hp={"head": "frozen"}),
    Situation("dot", "optim.optimizer=dot", optimizer="dot"),
    Situation("views", "a cache answers for the teacher (views)", views=4),
    *(Situation(f"{w} of", f"hp.{w}.of=METHOD", wrapper=w) for w in ("ls", "ctkd", "sakd") if w in METHODS),
)


def lines() -> Iterator[str]:
    """The matrix, what its columns mean, and the reasons."""
    wide = [max(len(s.name), 3) for s in SITUATIONS]
    yield "  ".join([f"{'':10}", *(f"{s.name:{w}}" for s, w in zip(SITUATIONS, wide, strict=True))]).rstrip()
    reasons: dict[tuple[str, str], list[str]] = {}
    for name in METHODS:
        row = []
        for situation in SITUATIONS:
            reason = refusal(name, situation)
            row.append("yes" if reason is None else "-")
            if reason is not None:
                reasons.setdefault((situation.name, general(reason, name)), []).append(name)
        yield "  ".join([f"{name:10}", *(f"{cell:{w}}" for cell, w in zip(row, wide, strict=True))]).rstrip()
    yield ""
    yield "All of it also in several processes (processes), and with all loaders (loader)."
    yield from (f"{s.name}: {s.about}" for s in SITUATIONS)
    yield ""
    yield "why not"
    for (situation, reason), names in reasons.items():
        yield f"  {situation}: {', '.join(names)}"
        yield f"    {reason}"


def general(reason: str, name: str) -> str:
    """Without the method's name, so that equal reasons are said once."""
    return re.sub(rf"^{name}\b|(?<=hp\.){name}\b|(?<=wrap ){name}\b|(?<='){name}(?=')", "METHOD", reason)


def refusal(name: str, situation: Situation) -> str | None:
    """Why a method cannot be used so, None if it can."""
    try:
        for terms in attempt(name, situation):
            assert all(term.raw.isfinite() for term in terms.values()), (name, situation.name)
    except UserError as e:
        return str(e)
    return None


def attempt(name: str, situation: Situation) -> Iterator[Any]:
    """The terms of one step of each phase."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(IMAGES) % CLASSES
    images = torch.randn(IMAGES, 3, SIZE, SIZE, generator=rng)
    batch = Batch(images, labels, torch.arange(IMAGES), strong=images.flip(3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student, teacher = build("resnet8", CLASSES), situation.teacher().requires_grad_(False).eval()
        setup = Setup(student, teacher, probe(student, SIZE), probe(teacher, SIZE), labels, IMAGES)
        method = build_small(name, situation, setup)
        if situation.views is not None:
            refuse_readers(name, method, situation.views, SIZE)
        optim = Optim(epochs=1, batch_size=IMAGES, lr=1e-3, optimizer=situation.optimizer)
        for phase in method.phases():
            if phase.before is not None:
                phase.before([batch])
            activate(method, phase)
            yield step(method, teacher_features(teacher, batch), batch, phase, make_optimizer(phase, optim)[0])


def build_small(name: str, situation: Situation, setup: Setup) -> Method:
    if situation.wrapper is not None:
        wrapper = METHODS[situation.wrapper]
        return wrapper(setup, replace(wrapper.Config(), of=name))  # type: ignore[call-arg]
    config = METHODS[name].Config()
    small = {key: value for key, value in SMALL.items() if hasattr(config, key)}
    if isinstance(config, Contrast.Config):
        small["k"] = IMAGES
    config = replace(config, **small, **situation.hp)
    if situation.other_classes and not crosses_tasks(name, config):
        refuse_other_classes(name, config)
    return METHODS[name](setup, config)
