"""Settings -> what a stage needs: prepared data, loaders, networks with their seeds, the frozen teacher, the method."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from pupil import checkpoint, models
from pupil.config import HOME
from pupil.data import Prepared, load
from pupil.data.prepare import TEACHER
from pupil.fit import refuse_batch_of_one
from pupil.kept import refuse_readers
from pupil.methods import METHODS
from pupil.methods.alone import Alone
from pupil.methods.base import Method, Setup
from pupil.net import FrozenLinear, Net, cut, probe
from pupil.optim import Optim
from pupil.settings import Settings, plain
from pupil.types import UserError

RUNNING = ("loader", "processes", "resume_every", "precision", "layout", "compile")  # how a training is run


class Job(NamedTuple):
    """One training, built and not yet begun."""

    stage: str  # train_teacher | train_student | retrain_teacher | distill
    title: str
    method: Method | Alone
    teacher: Net | None
    optim: Optim
    seed: int
    meta: dict[str, Any]  # of the checkpoint: network, method, surgery, role, teacher
    params: dict[str, Any]  # of the record
    teacher_folder: Path | None
    imported: Mapping[str, str] | None = None  # layout and SHA-256 of the file, of a network that is not trained
    views: int | None = None  # ways in which each image is augmented; None: in each epoch another


def single(settings: Settings, data: Prepared) -> Job:
    """A network on labels: a teacher, a matched baseline student, or SH-KD's teacher."""
    role = settings.train.role
    network = settings.train.network or (settings.students if role == "student" else settings.teachers)[0]
    own_seed = settings.seeds[0] if role == "student" else settings.teacher.seed
    seed = own_seed if settings.train.seed is None else settings.train.seed
    optim = settings.optim if role == "student" else settings.teacher.optim
    recipe = ("protocol", "optim", "student", "views") if role == "student" else ("protocol", "teacher")
    read = recipe if pattern(settings) is None else (f"{role}.checkpoint",)
    settings.refuse_unused("data", "train", "prepared", *RUNNING, *read)
    net = student(network, len(data.manifest["classes"]), seed, data.manifest["image_size"])
    params = {"role": role, "network": network, "seed": seed, "optim": plain(optim)}
    meta = {"network": network, "role": role, "method": None, "surgery": {}, "teacher": None}
    if pattern(settings) is None:
        key = "optim.batch_size" if role == "student" else "teacher.optim.batch_size"
        refuse_batch_of_one(Alone(net), None, len(data.splits["train"][1]), data.manifest["image_size"], optim.batch_size, key)
    if role != "shkd":
        if settings.train.head_of is not None:
            raise UserError(f"train.head_of has no effect with train.role={role}; only shkd borrows a classifier")
        stage, title = (
            ("train_teacher", f"teacher {network}") if role == "teacher" else ("train_student", f"{network} alone, seed {seed}")
        )
        views = settings.views if role == "student" else None  # the baseline sees what the taught students see
        return Job(stage, title, Alone(net), None, optim, seed, meta, params | {"views": views}, None, views=views)
    folder = find(settings.train.head_of or f"out/models/student/{settings.students[0]}/{settings.seeds[0]}")
    lender, lent = checkpoint.load(folder)
    same_classes(lent, data, folder)
    borrowed = FrozenLinear.of(lender.head)
    theirs, ours = borrowed.weight.shape[1], FrozenLinear.of(net.head).weight.shape[1]
    if theirs != ours:
        raise UserError(
            f"shkd: {network}'s embedding must be as wide as that of {lent['network']}, whose classifier it borrows;"
            f" got {ours} and {theirs}; choose a pair of equal width"
        )
    net.head = borrowed
    params |= {"head_of": lent["network"]}
    meta |= {"head": {"network": lent["network"], "sha256": lent["sha256"]}}
    title = f"teacher {network} under {lent['network']}'s classifier (SH-KD)"
    return Job("retrain_teacher", title, Alone(net), None, optim, seed, meta, params, folder)


def pattern(settings: Settings) -> str | None:
    """What is to be imported instead of trained, by the role of stages/train.py."""
    return {"teacher": settings.teacher.checkpoint, "student": settings.student.checkpoint}.get(settings.train.role)


def distillation(settings: Settings, data: Prepared) -> Job:
    """A student taught by a frozen teacher."""
    cell, name = settings.distill, settings.distill.method or next(iter(taught_by(settings)))
    settings.refuse_unused("data", "optim", "distill", "protocol", f"hp.{name}", "prepared", "views", *RUNNING)
    seed = settings.seeds[0] if cell.seed is None else cell.seed
    return lesson(settings, data, lecturer(settings, data, [name]), name, seed)


def table(settings: Settings, data: Prepared) -> list[list[Job]]:
    """For each seed the students that are trained side by side; they share their teacher."""
    cell, names = settings.distill, taught_by(settings)
    rows = (f"hp.{name}" for name in names)
    read = "data", "optim", "distill", "protocol", *rows, "tables", "methods", "seeds", "prepared", "views", "overlap", *RUNNING
    settings.refuse_unused(*read)
    if cell.method is not None:
        raise UserError(f"distill.method={cell.method} names one method, and a table has several; use distill.table or methods")
    teacher = lecturer(settings, data, names)
    seeds = settings.seeds if cell.seed is None else (cell.seed,)
    return [[lesson(settings, data, teacher, name, seed) for name in names] for seed in seeds]


def taught_by(settings: Settings) -> Sequence[str]:
    """The methods of the table that is asked for; else those of `methods`, or of the first table."""
    groups = {table.name: table.methods for table in settings.tables}
    if settings.distill.table is not None:
        return groups[settings.distill.table]
    return settings.methods or next(iter(groups.values()))


class Lecturer(NamedTuple):
    """A teacher that is loaded, with its classes cut to the students' if there are more."""

    net: Net
    folder: Path
    meta: dict[str, Any]  # of its checkpoint
    kept: list[int] | None  # where the students' classes are among its own, if they are


def lecturer(settings: Settings, data: Prepared, names: Sequence[str]) -> Lecturer:
    """`names`: the methods that it is for."""
    cell = settings.distill
    folder = find(cell.checkpoint or f"out/models/teacher/{cell.teacher or settings.teachers[0]}")
    teacher, taught = checkpoint.load(folder)
    expected = cell.teacher or (None if cell.checkpoint else settings.teachers[0])
    if expected not in (None, taught["network"]):
        raise UserError(
            f"{folder} holds a {taught['network']}, but the teacher asked for is {expected};"
            " give distill.teacher or another folder"
        )
    m = data.manifest
    kept = None if taught["classes"] == m["classes"] else outputs(taught["classes"], m.get("unmerged", m["classes"]))
    if kept is not None:
        cut(teacher, kept)
    for name in names if kept is None else ():
        if not crosses_tasks(name, settings.hp[name]):
            if taught["classes"] == m["teacher_classes"] != m["classes"]:
                refuse_other_classes(name, settings.hp[name])
            same_classes(taught, data, folder)
    return Lecturer(teacher, folder, taught, kept)


def lesson(settings: Settings, data: Prepared, lecturer: Lecturer, name: str, seed: int) -> Job:
    """One method at one seed."""
    teacher, folder, taught, kept = lecturer
    m, labels = data.manifest, data.splits["train"][1]
    network, classes = settings.distill.student or settings.students[0], len(m["classes"])
    net, hp = student(network, classes, seed, m["image_size"]), settings.hp[name]
    method = build_method(name, net, teacher, m["image_size"], labels, hp, seed, settings.optim.batch_size)
    refuse_batch_of_one(method, teacher, len(labels), m["image_size"], settings.optim.batch_size, "optim.batch_size")
    if settings.views is not None:
        refuse_readers(name, method, settings.views, m["image_size"])
    shared = taught["role"] == "shkd"
    label = f"{taught['network']}{' (SH-KD)' if shared else ''}"
    params = {"role": "distilled", "network": network, "teacher": label, "method": name, "seed": seed}
    params |= {"optim": plain(settings.optim), "hp": plain(hp), "views": settings.views}
    ancestor = {"network": taught["network"], "role": taught["role"], "sha256": taught["sha256"]}
    if kept is not None:
        ancestor |= {"cut": {"kept": kept, "of": len(taught["classes"])}}
        params |= {"teacher_outputs": f"{classes} of {len(taught['classes'])}"}
    meta = {"network": network, "role": "distilled", "method": name, "surgery": method.surgery, "hp": plain(hp)}
    title = f"{network} by {name} from {label}, seed {seed}"
    meta |= {"teacher": ancestor}
    return Job("distill", title, method, teacher, settings.optim, seed, meta, params, folder, views=settings.views)


def build_method(
    name: str,
    net: Net,
    teacher: Net,
    image_size: int,
    labels: Tensor,
    hp: Method.Config,
    seed: int,
    batch_size: int = Setup.batch_size,
) -> Method:
    """The method around a student; what it initialises has a random stream of its own.  `labels`: of the training set."""
    setup = Setup(net, teacher, probe(net, image_size), probe(teacher, image_size), labels, batch_size)
    seed_everything("method", seed)
    return METHODS[name](setup, hp)


def student(network: str, classes: int, seed: int, image_size: int) -> Net:
    """The initial network of a seed: the same whatever is done to it afterwards."""
    seed_everything("network", seed)
    return models.build(network, classes, image_size)


def seed_everything(stream: str, seed: int) -> None:
    """Seeds torch for one purpose; streams of the same seed are independent."""
    digest = hashlib.sha256(f"{stream} {seed}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))


def prepared(settings: Settings) -> Prepared:
    """What the prepare stage left; it must have been prepared for these settings."""
    folder = find(settings.prepared)
    if not (folder / "manifest.json").exists():
        raise UserError(f"no prepared data in {settings.prepared}; run dvc repro prepare first")
    data = load(folder)
    ours, theirs = plain(settings.data), data.manifest["config"]
    for key, value in ours.items():
        if theirs.get(key) != value:
            raise UserError(
                f"{settings.prepared} was prepared with data.{key} = {theirs.get(key)!r}, now it is {value!r};"
                f" run dvc repro prepare, or python stages/prepare.py data.{key}={value} out=runs/data"
                " and give prepared=runs/data"
            )
    own = folder / TEACHER
    return load(own) if settings.train.role == "teacher" and own.exists() else data


def outputs(theirs: Sequence[Any], wanted: Sequence[Any]) -> list[int] | None:
    """Where the students' classes are among the teacher's outputs, in the students' order; None if one is missing."""
    return [theirs.index(name) for name in wanted] if set(wanted) <= set(theirs) else None


def crosses_tasks(name: str, hp: Method.Config) -> bool:
    """Whether a teacher of other classes can teach with this method and these weights."""
    return METHODS[name].crosses_tasks(hp)


def refuse_other_classes(name: str, hp: Method.Config) -> NoReturn:
    """The teachers have classes of their own, by the settings, and the method compares classes."""
    setting = "kl" if hp.kl else "head" if hp.head != "own" else "then"  # refilled's second phase
    term = name if METHODS[name].needs_same_classes else f"{name} with hp.{name}.{setting}={getattr(hp, setting)}"
    others = ", ".join(other for other, method in METHODS.items() if crosses_tasks(other, method.Config()))
    raise UserError(
        f"{term} needs a teacher of the student's classes, more or not, and data.teacher_classes or data.overlap gives others;"
        f" use a method on maps or embeddings: {others}"
    )


def same_classes(meta: dict[str, Any], data: Prepared, folder: Path) -> None:
    if meta["classes"] != data.manifest["classes"]:
        again = "import it again with --data and the folder of the prepared data, if its outputs are those classes"
        mend = again if "imported" in meta else "train it again: dvc repro"
        raise UserError(
            f"{folder} was trained on {len(meta['classes'])} classes ({', '.join(meta['classes'][:3])}, ...), the data has"
            f" {len(data.manifest['classes'])} ({', '.join(data.manifest['classes'][:3])}, ...); {mend}"
        )


def find(path: str) -> Path:
    """A path from the settings: as given if it is there, else below the checkout."""
    return Path(path) if Path(path).exists() else HOME / path
