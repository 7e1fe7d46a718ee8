"""Which settings are possible: names are in the tables, numbers in their ranges.  Every stage checks all of the page."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pupil import models
from pupil.data import SOURCES
from pupil.data import check as check_data
from pupil.data.memory import LOADERS, possible
from pupil.data.prepare import recipe
from pupil.methods import METHODS
from pupil.names import WANTED, plain
from pupil.optim import Optim
from pupil.settings import Settings
from pupil.speed import COMPILES, LAYOUTS, PRECISIONS
from pupil.types import UserError


def check(s: Settings) -> None:
    """Names are in the tables and numbers are possible; every stage refuses a bad page before it does anything."""
    one_of("data.name", s.data.name, SOURCES)
    check_data(s.data)
    for path, names, table in (
        ("teachers", s.teachers, None),
        ("students", s.students, None),
        ("methods", s.methods, METHODS),
        ("shkd", s.shkd, None),
        ("train.network", (s.train.network,), None),
        ("distill.teacher", (s.distill.teacher,), None),
        ("distill.student", (s.distill.student,), None),
        ("distill.method", (s.distill.method,), METHODS),
    ):
        for name in names:
            if name is not None and not plain(name):
                raise UserError(f"{path}: {name!r} {WANTED}")
            if name is not None and table is None:
                a_network(path, name)
            elif name is not None:
                one_of(path, name, table)
    check_tables(s)
    for path, values in (
        ("teachers", s.teachers),
        ("students", s.students),
        ("methods", s.methods or s.tables),
        ("seeds", s.seeds),
    ):
        if not values:
            raise UserError(f"{path}: at least one is needed, got an empty list")
    for path, values in (
        ("teachers", s.teachers),
        ("students", s.students),
        ("methods", s.methods),
        ("seeds", s.seeds),
        ("shkd", s.shkd),
    ):
        if len(set(values)) < len(values):
            raise UserError(f"{path}: every entry once, got {list(values)}")
    one_of("train.role", s.train.role, ("teacher", "student", "shkd"))
    one_of("protocol.deploy", s.protocol.deploy, ("last", "best_by_val"))
    for path, seed in (
        *((f"seeds[{i}]", v) for i, v in enumerate(s.seeds)),
        ("teacher.seed", s.teacher.seed),
        ("data.seed", s.data.seed),
        ("train.seed", s.train.seed),
        ("distill.seed", s.distill.seed),
    ):
        within(path, seed, seed is None or seed >= 0, "0 or more")
    a_pattern("teacher.checkpoint", s.teacher.checkpoint, s.teachers, ("network",))
    a_pattern("student.checkpoint", s.student.checkpoint, s.students, ("network", "seed"))
    check_optim("optim", s.optim)
    check_optim("teacher.optim", s.teacher.optim)
    for name, hp in s.hp.items():
        within(f"hp.{name}.T", hp.T, hp.T > 0, "greater than 0")
        for weight in ("ce", "kl", "beta"):
            within(f"hp.{name}.{weight}", getattr(hp, weight), getattr(hp, weight) >= 0, "0 or more")
        one_of(f"hp.{name}.head", hp.head, ("own", "init", "frozen"))
        if not (hp.ce or hp.kl or hp.beta):
            raise UserError(f"hp.{name}: ce, kl and beta are all 0, so there is nothing to train on")
    one_of("loader", s.loader, LOADERS)
    possible(s.loader, recipe(s.data).crop == "resized")
    one_of("precision", s.precision, PRECISIONS)
    one_of("layout", s.layout, LAYOUTS)
    within("compile", s.compile, s.compile in COMPILES, "false, true or auto")
    within("views", s.views, s.views is None or s.views >= 1, "1 or more, or null")
    within("resume_every", s.resume_every, s.resume_every >= 0, "0 or more seconds")
    within("processes", s.processes, s.processes >= 1, "1 or more")
    within("overlap", s.overlap, not s.overlap or s.compile is not True, "false with compile: true (CUDA graphs)")
    within("compile", s.compile, s.compile is not True or s.processes == 1, "false with several processes")
    if s.device != "auto" and s.device.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"device: expected auto, cpu, cuda or cuda:N, got {s.device!r}")


def check_tables(s: Settings) -> None:
    """Their names become folders, and a method has one place in the comparison."""
    places = dict.fromkeys(s.methods, "methods")
    for i, table in enumerate(s.tables):
        path = f"tables[{i}]"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", table.name) or table.name in {other.name for other in s.tables[:i]}:
            raise UserError(f"{path}.name: expected a name of its own of letters, digits, - and _, got {table.name!r}")
        if not table.methods:
            raise UserError(f"{path}.methods: at least one is needed, got an empty list")
        for method in table.methods:
            one_of(f"{path}.methods", method, METHODS)
            if method in places:
                raise UserError(f"{path}.methods: {method} is in {places[method]} already; a method is trained in one place")
            places[method] = path
    if s.distill.table is not None:
        one_of("distill.table", s.distill.table, [table.name for table in s.tables])


def check_optim(path: str, o: Optim) -> None:
    within(f"{path}.epochs", o.epochs, o.epochs >= 1, "1 or more")
    within(f"{path}.batch_size", o.batch_size, o.batch_size >= 1, "1 or more")
    within(f"{path}.lr", o.lr, o.lr > 0, "greater than 0")
    within(f"{path}.momentum", o.momentum, 0 <= o.momentum < 1, "from 0 to below 1")
    within(f"{path}.weight_decay", o.weight_decay, o.weight_decay >= 0, "0 or more")
    within(f"{path}.gamma", o.gamma, 0 < o.gamma <= 1, "above 0, at most 1")
    one_of(f"{path}.schedule", o.schedule, ("step", "cosine"))
    one_of(f"{path}.optimizer", o.optimizer, ("sgd", "dot"))
    if o.optimizer == "dot":
        within(f"{path}.dot_delta", o.dot_delta, 0 <= o.dot_delta <= o.momentum < 1 - o.dot_delta, "momentum +- delta in 0..1")
        within(f"{path}.nesterov", o.nesterov, not o.nesterov, "false with optimizer dot")
    if list(o.milestones) != sorted(set(o.milestones)) or any(m < 1 for m in o.milestones):
        raise UserError(f"{path}.milestones: expected epochs in rising order, got {list(o.milestones)}")
    if o.nesterov and not o.momentum:
        raise UserError(f"{path}.nesterov needs a momentum above 0, got {o.momentum}")


def a_pattern(path: str, text: str | None, networks: Sequence[str], known: Sequence[str]) -> None:
    """A path in which {network} stands for each network's name."""
    if text is None:
        return
    if not text.strip():
        raise UserError(f"{path}: expected the path of a file or of a model folder, or null, got {text!r}")
    if Path(text).parts[0] == "out":
        raise UserError(f"{path}: {text!r} is where the pipeline writes, and DVC clears it; copy the folder to another place")
    for name in re.findall(r"\{(\w*)\}", text):
        if name not in known:
            raise UserError(f"{path}: {{{name}}} stands for nothing; known: {', '.join(f'{{{k}}}' for k in known)}")
    if len(networks) > 1 and "{network}" not in text:
        raise UserError(
            f"{path}: {text!r} is one network for {len(networks)} names ({', '.join(networks)});"
            " write {network} where their paths differ"
        )


def within(path: str, value: Any, fine: bool, expected: str) -> None:
    if not fine:
        raise UserError(f"{path}: expected {expected}, got {value}")


def a_network(path: str, name: str) -> None:
    try:
        models.check(name)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None


def one_of(path: str, name: str, names: Any) -> None:
    if name not in names:
        close = get_close_matches(name, list(names), 1, 0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
        raise UserError(f"{path}: there is no {name!r}; {hint}")
