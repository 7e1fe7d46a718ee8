"""`python -m pupil check`: everything of the configuration is built and stepped, nothing is trained or written."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from pupil import estimate, measures
from pupil.assemble import build_method, crosses_tasks, refuse_other_classes, student
from pupil.data.memory import choose
from pupil.data.prepare import recipe
from pupil.feeds import pick_device
from pupil.fit import refuse_batch_of_one
from pupil.imported import look
from pupil.kept import refuse_readers
from pupil.methods.alone import Alone
from pupil.methods.base import Method
from pupil.models.external import unwatched
from pupil.models.taps import External
from pupil.net import Net, cut, probe
from pupil.outline import Outline, outline_of
from pupil.recipes import told
from pupil.room import need
from pupil.settings import Settings
from pupil.types import UserError

Built = tuple[Method | Alone, Net | None]  # what is trained, its teacher


class Trial(NamedTuple):
    """Trainings that differ in their seed alone."""

    title: str
    number: int
    settings: Settings  # with their own optim
    build: Callable[[], Built]


def tell_disk(settings: Settings, outline: Outline, networks: list[tuple[int, int]]) -> None:
    """`networks`: (bytes of the weights, how many of them)."""
    stored = sum(outline.images.values()) * 3 * outline.image_size**2
    print(choose(settings.loader, stored, pick_device(settings.device), recipe(settings.data).crop == "resized").why)
    print(estimate.disk(settings, outline.images, outline.apart, outline.classes, networks))


def tell_time(trials: list[Trial], outline: Outline, device: torch.device) -> None:
    """Measures a few steps of each."""
    print("steps, measured with made images:")
    whole = 0.0
    for title, number, settings, build in trials:
        method, teacher = build()
        pace = estimate.pace(method, teacher, settings, outline.image_size, outline.classes, device)
        epochs = sum(phase.epochs or settings.optim.epochs for phase in method.phases())
        epoch = pace.of(outline.training_images)
        whole += number * epochs * epoch
        one = f"{estimate.length(epoch)} an epoch, {estimate.length(epochs * epoch)} for {epochs} epochs"
        print(f"  {title}: {pace}, {one}", flush=True)
    n = sum(trial.number for trial in trials)
    print(f"time: {estimate.length(whole)} for {n} trainings one after the other on {device}, all epochs like a method's last;")
    print("  loading, validation, compiling and prepare come on top (`python -m pupil profile` measures with loading)")


def check(settings: Settings, timed: bool = False) -> None:
    """Prints networks, taps, methods, memory and disk; raises UserError at the first thing that cannot work.

    `timed`: measures a few steps of everything too, and foretells the time.
    """
    pick_device(settings.device)
    told(settings.recipe)  # refuses an unknown one
    outline = outline_of(settings)
    print(outline.about)
    trials, networks = list[Trial](), list[tuple[int, int]]()

    def add(trial: Trial, student: Net) -> None:
        trials.append(trial)
        networks.append((estimate.nbytes(student.state_dict().values()), trial.number))

    for role, names in (("teacher", settings.teachers), ("student", settings.students)):
        for name in names:
            print_network(role, name, outline.teacher_classes if role == "teacher" else outline.classes, outline.image_size)
    for line in look(settings, outline.teacher_classes, outline.classes, outline.image_size):
        print(line)
    for name in dict.fromkeys(settings.students):
        alone = Alone(student(name, outline.classes, 0, outline.image_size))
        print_step(f"{name} alone", alone, None, outline, settings.optim.batch_size)
        if settings.student.checkpoint is None:
            add(Trial(f"{name} alone", len(settings.seeds), settings, partial(bare, name, outline)), alone.student)
    for teacher_name in settings.teachers:
        teacher = student(teacher_name, outline.teacher_classes, 0, outline.image_size).eval().requires_grad_(False)
        if not outline.apart and settings.teacher.checkpoint is None:
            each = outline.training_images, outline.image_size, settings.teacher.optim.batch_size, "teacher.optim.batch_size"
            refuse_batch_of_one(Alone(teacher), None, *each)
            theirs = replace(settings, optim=settings.teacher.optim)
            add(Trial(f"teacher {teacher_name}", 1, theirs, partial(bare, teacher_name, outline)), teacher)
        if outline.kept is not None:
            cut(teacher, outline.kept)
        for name in settings.students:
            for method_name in all_methods(settings):
                other_classes = outline.apart and outline.kept is None
                if other_classes and not crosses_tasks(method_name, settings.hp[method_name]):
                    refuse_other_classes(method_name, settings.hp[method_name])
                title, build = f"{name} by {method_name} from {teacher_name}", partial(cell, settings, outline, teacher)
                method, _ = build(name, method_name)
                if settings.views is not None:
                    refuse_readers(method_name, method, settings.views, outline.image_size)
                print_step(title, method, teacher, outline, settings.optim.batch_size)
                add(Trial(title, len(settings.seeds), settings, partial(build, name, method_name)), method.student)
    check_shkd(settings, outline)
    tell_disk(settings, outline, networks)
    if timed:
        tell_time(trials, outline, pick_device(settings.device))
    n = count(settings)
    print(f"fine: {n} trainings are configured")


def bare(name: str, outline: Outline) -> Built:
    return Alone(student(name, outline.classes, 0, outline.image_size)), None


def cell(settings: Settings, outline: Outline, teacher: Net, name: str, method: str) -> tuple[Method, Net]:
    hp, batch_size = settings.hp[method], settings.optim.batch_size
    labels = torch.arange(estimate.few(outline.training_images, batch_size)) % outline.classes
    net = student(name, outline.classes, 0, outline.image_size)
    return build_method(method, net, teacher, outline.image_size, labels, hp, 0, batch_size), teacher


def count(s: Settings) -> int:
    students = len(s.students) * len(s.seeds)
    cells, beside = students * len(s.methods), students * (len(all_methods(s)) - len(s.methods))
    imported = (len(s.teachers) if s.teacher.checkpoint else 0) + (students if s.student.checkpoint else 0)
    return (
        len(s.teachers)
        - imported
        + len(s.shkd) * len(s.students)
        + students
        + (len(s.teachers) + len(s.shkd)) * cells
        + len(s.teachers) * beside
    )


def all_methods(s: Settings) -> list[str]:
    """Cell by cell and side by side."""
    return [*s.methods, *(method for table in s.tables for method in table.methods)]


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


def print_network(role: str, name: str, classes: int, image_size: int) -> None:
    net = student(name, classes, 0, image_size)
    f = probe(net, image_size)
    taps = "  ".join("x".join(str(n) for n in tap.shape[1:]) for tap in f.taps)
    cost = f"{measures.parameters(net):,} parameters, {measures.macs(net.eval(), image_size) / 1e6:,.1f} MMACs"
    print(f"{role} {name}: {cost}\n  taps (stem, stages, embedding): {taps}")
    if isinstance(net, External):
        print(f"  outputs of the modules: {'  '.join(net.found)}")
    if line := unwatched(name):
        print(f"  {line}")


def print_step(title: str, method: Method | Alone, teacher: Net | None, outline: Outline, batch_size: int) -> None:
    """One step on two images, for what only a step can show; and one on one image, if a batch will be of one."""
    refuse_batch_of_one(method, teacher, outline.training_images, outline.image_size, batch_size, "optim.batch_size")
    found, terms = need(method, teacher, outline.classes, outline.image_size)
    extra = trained_beside(method)
    about = f"{sum(p.numel() for p in extra):,} parameters beside the student, " if extra else ""
    names = " + ".join(f"{term.weight:g} {name}" for name, term in terms.items())
    built, kept = estimate.few(outline.training_images, batch_size), round(found.image * batch_size)
    memory = estimate.memory(method, teacher, kept, built, outline.training_images)
    print(f"{title}: loss {names}; {about}about {memory} to train at batch size {batch_size}")


def trained_beside(method: Method | Alone) -> list[Any]:
    inside = {id(p) for p in method.student.parameters()}
    return [p for p in method.parameters() if id(p) not in inside]
