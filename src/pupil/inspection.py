"""`python -m pupil check`: everything of the configuration is built and stepped once, nothing is trained or written."""

from typing import Any, NamedTuple

import torch

from pupil import measures
from pupil.assemble import build_method, crosses_tasks, find, outputs, refuse_other_classes, student
from pupil.data import SOURCES, Data, load
from pupil.data.classes import class_sets
from pupil.feeds import pick_device
from pupil.fit import refuse_batch_of_one
from pupil.imported import look
from pupil.kept import refuse_readers
from pupil.methods.alone import Alone
from pupil.methods.base import Method
from pupil.models.external import unwatched
from pupil.models.taps import External
from pupil.net import Net, cut, probe
from pupil.recipes import told
from pupil.room import need
from pupil.settings import Settings, plain
from pupil.types import UserError


class Outline(NamedTuple):
    """What can be known of the data before it is prepared."""

    classes: int
    teacher_classes: int
    apart: bool  # whether the teachers have classes of their own
    kept: list[int] | None  # where the students' are among these, if they are
    image_size: int
    training_images: int
    about: str


def check(settings: Settings) -> None:
    """Prints networks, taps, methods and memory; raises UserError at the first thing that cannot work."""
    pick_device(settings.device)
    told(settings.recipe)  # refuses an unknown one
    outline = outline_of(settings)
    print(outline.about)
    labels = torch.arange(outline.training_images) % outline.classes
    for role, names in (("teacher", settings.teachers), ("student", settings.students)):
        for name in names:
            print_network(role, name, outline.teacher_classes if role == "teacher" else outline.classes, outline.image_size)
    for line in look(settings, outline.teacher_classes, outline.classes, outline.image_size):
        print(line)
    for name in dict.fromkeys(settings.students):
        alone = Alone(student(name, outline.classes, 0, outline.image_size))
        print_step(f"{name} alone", alone, None, outline, settings.optim.batch_size)
    for teacher_name in settings.teachers:
        teacher = student(teacher_name, outline.teacher_classes, 0, outline.image_size).eval().requires_grad_(False)
        if not outline.apart and settings.teacher.checkpoint is None:
            each = outline.training_images, outline.image_size, settings.teacher.optim.batch_size, "teacher.optim.batch_size"
            refuse_batch_of_one(Alone(teacher), None, *each)
        if outline.kept is not None:
            cut(teacher, outline.kept)
        for name in settings.students:
            for method_name in all_methods(settings):
                other_classes = outline.apart and outline.kept is None
                if other_classes and not crosses_tasks(method_name, settings.hp[method_name]):
                    refuse_other_classes(method_name, settings.hp[method_name])
                net = student(name, outline.classes, 0, outline.image_size)
                hp, batch_size = settings.hp[method_name], settings.optim.batch_size
                method = build_method(method_name, net, teacher, outline.image_size, labels, hp, 0, batch_size)
                if settings.views is not None:
                    refuse_readers(method_name, method, settings.views, outline.image_size)
                print_step(f"{name} by {method_name} from {teacher_name}", method, teacher, outline, batch_size)
    check_shkd(settings, outline)
    n = count(settings)
    print(f"fine: {n} trainings are configured")


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
            theirs, apart = m["teacher_classes"] or m["classes"], bool(m["teacher_classes"])
            kept = outputs(theirs, m.get("unmerged", m["classes"])) if apart else None
            about = f"{len(m['classes'])} classes{beside(len(theirs), apart, kept)}"
            text = f"data: {m['name']}, {about}, {m['counts']} images of {m['image_size']} pixels, prepared"
            return Outline(len(m["classes"]), len(theirs), apart, kept, m["image_size"], m["counts"]["train"], text)
    names = tuple(str(k) for k in range(source.classes or 0)) if content is None else content.classes
    lists = [given for given in (config.classes, config.teacher_classes) if isinstance(given, tuple)]
    if content is None and any(isinstance(name, str) for given in lists for name in given):
        classes = how_many(config.classes, len(names))  # the names are known when the data are there
        apart = config.teacher_classes is not None
        theirs = how_many(config.teacher_classes, len(names)) if apart else classes
        kept = guess(config, theirs, classes) if apart else None
    else:
        sets = class_sets(config, names)
        classes, theirs, apart = len(sets.student), len(sets.teacher), sets.apart
        kept = outputs(sets.teacher, sets.student) if apart else None
    images = config.train_images or (config.per_class or 50) * classes
    about = f"{classes} classes{beside(theirs, apart, kept)}"
    text = f"data: {config.name}, {about}, images of {config.image_size} pixels; not prepared yet"
    return Outline(classes, theirs, apart, kept, config.image_size, images, text)


def how_many(given: int | str | tuple[int | str, ...] | None, of: int) -> int:
    return len(given) if isinstance(given, tuple) else given if isinstance(given, int) else of


def guess(config: Data, theirs: int, classes: int) -> list[int] | None:
    """`Outline.kept` before the names are known; where that leaves it open, as if the students' were there."""
    ours, given = config.classes, config.teacher_classes
    if isinstance(ours, tuple) and isinstance(given, tuple) and len({type(name) for name in (*ours, *given)}) == 1:
        return outputs(given, ours)
    return list(range(classes)) if classes <= theirs else None


def beside(classes: int, apart: bool, kept: list[int] | None) -> str:
    return f" (teachers: {classes} {'of their own' if kept is None else 'and these among them'})" if apart else ""


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
    memory = f"{found.at(batch_size) / 2**20:,.0f} MiB to train at batch size {batch_size}"
    print(f"{title}: loss {names}; {about}about {memory}")


def trained_beside(method: Method | Alone) -> list[Any]:
    inside = {id(p) for p in method.student.parameters()}
    return [p for p in method.parameters() if id(p) not in inside]
