"""`python -m pupil check`: everything of the configuration is built and stepped once, nothing is trained or written."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pupil import measures
from pupil.assemble import build_method, find, pick_device, student
from pupil.data import SOURCES, load
from pupil.data.draw import class_indices
from pupil.fit import step
from pupil.methods.alone import Alone
from pupil.methods.base import Method
from pupil.models.taps import External
from pupil.net import Net, probe
from pupil.settings import Settings, plain
from pupil.types import Batch, UserError


class Outline(NamedTuple):
    """What can be known of the data before it is prepared."""

    classes: int
    image_size: int
    training_images: int
    about: str


def check(settings: Settings) -> None:
    """Prints networks, taps, methods and memory; raises UserError at the first thing that cannot work."""
    pick_device(settings.device)
    outline = outline_of(settings)
    print(outline.about)
    labels = torch.arange(outline.training_images) % outline.classes
    for role, names in (("teacher", settings.teachers), ("student", settings.students)):
        for name in names:
            print_network(role, name, outline)
    for name in dict.fromkeys(settings.students):
        alone = Alone(student(name, outline.classes, 0, outline.image_size))
        print_step(f"{name} alone", alone, None, outline, settings.optim.batch_size)
    for teacher_name in settings.teachers:
        teacher = student(teacher_name, outline.classes, 0, outline.image_size).eval().requires_grad_(False)
        for name in settings.students:
            for method_name in settings.methods:
                net = student(name, outline.classes, 0, outline.image_size)
                method = build_method(method_name, net, teacher, outline.image_size, labels, settings.hp[method_name], 0)
                print_step(f"{name} by {method_name} from {teacher_name}", method, teacher, outline, settings.optim.batch_size)
    check_shkd(settings, outline)
    n = count(settings)
    print(f"fine: {n} trainings are configured")


def count(s: Settings) -> int:
    students, cells = len(s.students) * len(s.seeds), len(s.students) * len(s.seeds) * len(s.methods)
    return len(s.teachers) + len(s.shkd) * len(s.students) + students + (len(s.teachers) + len(s.shkd)) * cells


def check_shkd(settings: Settings, outline: Outline) -> None:
    for teacher in settings.shkd:
        for name in settings.students:
            widths = [
                probe(student(n, outline.classes, 0, outline.image_size), outline.image_size).embedding.shape[1]
                for n in (teacher, name)
            ]
            if widths[0] != widths[1]:
                raise UserError(
                    f"shkd: {teacher}'s embedding must be as wide as that of {name}, whose classifier it borrows;"
                    f" got {widths[0]} and {widths[1]}; choose a pair of equal width"
                )


def outline_of(settings: Settings) -> Outline:
    """From the prepared data if it is there, else from the source, without downloading anything."""
    config, source = settings.data, SOURCES[settings.data.name]
    content = source.load(config) if source.classes is None else None  # lists the files, reads none
    folder = find(settings.prepared)
    if (folder / "manifest.json").exists():
        m = load(folder).manifest
        if m["config"] == plain(config):
            if content is not None and m.get("fingerprint") != content.fingerprint:
                raise UserError(
                    f"the images in {config.path} have changed since they were prepared; run dvc repro --force prepare"
                )
            text = f"data: {m['name']}, {len(m['classes'])} classes, {m['counts']} images of {m['image_size']} pixels, prepared"
            return Outline(len(m["classes"]), m["image_size"], m["counts"]["train"], text)
    names = tuple(str(k) for k in range(source.classes or 0)) if content is None else content.classes
    given = config.classes
    if content is None and isinstance(given, tuple) and any(isinstance(name, str) for name in given):
        classes = len(given)  # the names are known when the data are there
    else:
        classes = len(class_indices(config, names))
    images = config.train_images or (config.per_class or 50) * classes
    text = f"data: {config.name}, {classes} classes, images of {config.image_size} pixels; not prepared yet"
    return Outline(classes, config.image_size, images, text)


def print_network(role: str, name: str, outline: Outline) -> None:
    net = student(name, outline.classes, 0, outline.image_size)
    f = probe(net, outline.image_size)
    taps = "  ".join("x".join(str(n) for n in tap.shape[1:]) for tap in f.taps)
    cost = f"{measures.parameters(net):,} parameters, {measures.macs(net.eval(), outline.image_size) / 1e6:,.1f} MMACs"
    print(f"{role} {name}: {cost}\n  taps (stem, stages, embedding): {taps}")
    if isinstance(net, External):
        print(f"  found at: {'  '.join(net.found)}")


def print_step(title: str, method: Method | Alone, teacher: Net | None, outline: Outline, batch_size: int) -> None:
    """One step on two images, for what only a step can show."""
    images = torch.randn(2, 3, outline.image_size, outline.image_size)
    batch = Batch(images, torch.tensor([0, 1]) % outline.classes, torch.tensor([0, 1]))
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    for phase in method.phases():
        method.requires_grad_(False).eval()
        for group in phase.train:
            group.module.requires_grad_(True).train()
        t = None if teacher is None else teacher.features(images)
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 1e-6)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            terms = step(method, t, batch, phase, optimizer)
    weights = total(method.parameters()) + total(method.buffers())
    activations = max(0, sum(kept.values()) - weights) * batch_size / 2
    extra = trained_beside(method)
    about = f"{sum(p.numel() for p in extra):,} parameters beside the student, " if extra else ""
    names = " + ".join(f"{term.weight:g} {name}" for name, term in terms.items())  # type: ignore[possibly-undefined]
    memory = f"{(3 * weights + activations) / 2**20:,.0f} MiB to train at batch size {batch_size}"
    print(f"{title}: loss {names}; {about}about {memory}")


def trained_beside(method: Method | Alone) -> list[Any]:
    inside = {id(p) for p in method.student.parameters()}
    return [p for p in method.parameters() if id(p) not in inside]


def total(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
