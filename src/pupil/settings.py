"""The settings: plain frozen dataclasses, and the way from nested dicts to them.  No Hydra, no files.

A method's own settings are its `Config`, a data set's and the optimiser's are `Data` and `Optim`: a value's type,
default and meaning stand in one place, in the code that uses it.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from pupil.data import Data
from pupil.methods import METHODS
from pupil.methods.base import Method
from pupil.optim import Optim
from pupil.types import UserError


@dataclass(frozen=True)
class Teacher:
    """How teachers are trained, or where they come from instead."""

    checkpoint: str | None = None  # a published file or a model folder; {network} stands for the teacher's name
    seed: int = 0
    optim: Optim = Optim()


@dataclass(frozen=True)
class Student:
    """Where the matched baselines come from, if they are not trained."""

    checkpoint: str | None = None  # a published file or a model folder; {network} and {seed} stand for the baseline's


@dataclass(frozen=True)
class Protocol:
    """What is deployed and what is reported."""

    deploy: str = "last"  # last | best_by_val
    papers_best_on_test: bool = False


@dataclass(frozen=True)
class Train:
    """Which network stages/train.py trains; dvc.yaml gives these."""

    role: str = "student"  # teacher | student | shkd
    network: str | None = None  # None: the first of `students`, or of `teachers`
    seed: int | None = None  # None: the first of `seeds`, or teacher.seed
    head_of: str | None = None  # shkd: the folder of the trained student whose classifier is borrowed


@dataclass(frozen=True)
class Distill:
    """Which cell of the matrix stages/distill.py trains; dvc.yaml gives these."""

    teacher: str | None = None  # None: the first of `teachers`, and so on
    student: str | None = None
    method: str | None = None
    seed: int | None = None
    checkpoint: str | None = None  # the teacher's folder; None: what train_teacher left
    table: str | None = None  # stages/table.py: one of `tables`; None: all of `methods`


@dataclass(frozen=True)
class Table:
    """Methods whose students are trained side by side, on the same batches and one pass of the teacher."""

    name: str
    methods: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """params.yaml and the command line, checked."""

    data: Data = Data()
    teachers: tuple[str, ...] = ("resnet20",)
    students: tuple[str, ...] = ("resnet8",)
    methods: tuple[str, ...] = ("kd",)
    seeds: tuple[int, ...] = (0, 1, 2)
    shkd: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    teacher: Teacher = Teacher()
    student: Student = Student()
    optim: Optim = Optim()
    protocol: Protocol = Protocol()
    hp: Mapping[str, Method.Config] = field(default_factory=lambda: {name: m.Config() for name, m in METHODS.items()})
    device: str = "auto"
    loader: str = "auto"  # auto | resident | streamed | workers | dali: who makes the batches, which are the same
    precision: str = "float32"  # float32 | bf16 | auto: of the networks in training; losses and weights are float32
    layout: str = "auto"  # contiguous | channels_last | auto (that on CPUs and with bf16): of images, maps and weights
    compile: bool | str = False  # false | true (both networks) | auto: by torch.compile
    overlap: bool = False  # on a GPU: students that are trained side by side take their steps in CUDA streams of their own
    views: int | None = None  # ways in which each image is augmented; then a cache answers for the teacher
    recipe: str | None = None  # whose published numbers the comparison shows beside the measured ones
    resume_every: float = 60.0  # seconds between two points that a killed training goes on from; 0: after each step
    processes: int = 1  # that share the work of a training; the numbers are those of one, to rounding
    experiment: str = "pupil"
    train: Train = Train()
    distill: Distill = Distill()
    prepared: str = "out/data"
    out: str | None = None  # None: runs/<stage>-<time>, so that a run by hand never touches DVC's outputs
    record: str | None = None
    given: tuple[str, ...] = ()  # keys set on the command line

    def refuse_unused(self, *sections: str) -> None:
        """A key given on the command line that the stage would not read is a mistake."""
        for key in self.given:
            if not any(key == s or key.startswith(s + ".") for s in (*sections, "device", "experiment", "out", "record")):
                raise UserError(
                    f"{key} has no effect on this stage, which reads {', '.join(sections)}; edit params.yaml or drop it"
                )


def defaults() -> dict[str, Any]:
    """The whole page; a method's values are None, which stands for its preset's."""
    tree = plain(Settings())
    del tree["given"]
    tree["hp"] = {name: dict.fromkeys(row) | {"preset": "default"} for name, row in tree["hp"].items()}
    return tree


def configured(name: str, row: Mapping[str, Any]) -> Method.Config:
    """A method's settings: what the row gives, else its preset, else the defaults."""
    method = METHODS[name]
    presets = {"default": {}, **method.presets}
    given = {key: value for key, value in row.items() if value is not None}
    preset = given.get("preset", "default")
    if not isinstance(preset, str) or preset not in presets:
        raise UserError(f"hp.{name}.preset: there is no {preset!r}; known: {', '.join(presets)}")
    return convert(method.Config, plain(method.Config()) | presets[preset] | given, f"hp.{name}")


def plain(value: Any) -> Any:
    """Dataclasses and tuples as dicts and lists."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, tuple) else value


def overlay(base: Mapping[str, Any], over: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """`over` on top of `base`, section by section; keys that `base` lacks are refused."""
    tree = dict(base)
    for key, value in over.items():
        if key not in base:
            raise UserError(f"unknown key {path + str(key)!r}{nearest(path + str(key), all_keys(base, path))}")
        if isinstance(base[key], Mapping):
            if not isinstance(value, Mapping):
                raise UserError(f"{path}{key} is a section with keys {', '.join(base[key])}, got {value!r}")
            value = overlay(base[key], value, f"{path}{key}.")
        tree[key] = value
    return tree


def all_keys(tree: Mapping[str, Any], path: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        found.append(f"{path}{key}")
        found += all_keys(value, f"{path}{key}.") if isinstance(value, Mapping) else []
    return found


def nearest(name: str, names: Sequence[str]) -> str:
    close = get_close_matches(name, names, 1, 0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    tops = sorted({n.split(".")[0] for n in names})
    return f"; known: {', '.join(tops)}" if len(tops) < 40 else ""


def convert(kind: Any, value: Any, path: str) -> Any:
    """`value` as `kind`: a dataclass, a tuple, a union or a plain type."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if not isinstance(value, Mapping) or value.keys() - hints.keys():
            raise UserError(f"{path}: expected {{{', '.join(hints)}}}, got {value!r}")
        if missing := [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory and f.name not in value]:
            raise UserError(f"{path}: {missing[0]} is missing, expected {{{', '.join(hints)}}}, got {value!r}")
        return typing.cast(Any, kind)(**{k: convert(hints[k], v, f"{path}.{k}".lstrip(".")) for k, v in value.items()})
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        choices = typing.get_args(kind)
        if value is None and type(None) in choices:
            return None
        for choice in (c for c in choices if c is not type(None)):
            if typing.get_origin(choice) or type(value) is choice or (choice is float and type(value) is int):
                return convert(choice, value, path)
        raise UserError(f"{path}: expected {name_of(kind)}, got {value!r}")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{path}: expected a list such as [{example(typing.get_args(kind)[0])}], got {value!r}")
        return tuple(convert(typing.get_args(kind)[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UserError(f"{path}: expected {name_of(kind)}, got {value!r}")
    return value


def name_of(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    return " or ".join(names.get(k, "a list") for k in typing.get_args(kind) or (kind,))


def example(kind: Any) -> str:
    return "0, 1" if kind is int else "{name: all, methods: [kd, at]}" if kind is Table else "name"
