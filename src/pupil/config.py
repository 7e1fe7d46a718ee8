"""Configuration: params.yaml -> Hydra -> plain frozen dataclasses.  The only file that imports hydra and omegaconf.

params.yaml is loaded here and given to Hydra through its ConfigStore, so every stage script takes overrides and `-m`.
On a machine without Hydra a stage runs from a resolved configuration: `python stages/train.py --config FILE.json
optim.epochs=2` (`python -m pupil resolve > FILE.json` writes one).
"""

import dataclasses
import hashlib
import json
import math
import os
import shlex
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from pupil.data import SOURCES, Data
from pupil.fit import Optim
from pupil.methods import METHODS
from pupil.methods.base import Method
from pupil.models import NETWORKS
from pupil.types import UserError

ROOT = Path(__file__).resolve().parents[2]  # where the code is
HOME = Path(os.environ.get("DVC_ROOT", ROOT))  # the real checkout, also inside a copy that DVC made


@dataclass(frozen=True)
class Teacher:
    """How teachers are trained."""

    seed: int = 0
    optim: Optim = Optim()


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


@dataclass(frozen=True)
class Settings:
    """params.yaml and the command line, checked."""

    data: Data = Data()
    teachers: tuple[str, ...] = ("resnet20",)
    students: tuple[str, ...] = ("resnet8",)
    methods: tuple[str, ...] = ("kd",)
    seeds: tuple[int, ...] = (0, 1, 2)
    shkd: tuple[str, ...] = ()
    teacher: Teacher = Teacher()
    optim: Optim = Optim()
    protocol: Protocol = Protocol()
    hp: Mapping[str, Method.Config] = field(default_factory=lambda: {name: m.Config() for name, m in METHODS.items()})
    device: str = "auto"
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


def launch(stage: Callable[[Settings], None]) -> None:
    """Run a stage script: settings from params.yaml and the command line; a user's mistake is one line and status 2."""
    with user_errors():
        argv = words(sys.argv[1:])
        if argv[:1] == ["--config"]:
            stage(from_json(argv[1:]))
        else:
            launch_hydra(stage, argv)


def launch_with(overrides: Sequence[str], use: Callable[[Settings], None]) -> None:
    """Settings from params.yaml and overrides given as words."""
    sys.argv[1:] = overrides
    launch(use)


def words(argv: Sequence[str]) -> list[str]:
    """The arguments, with the one after --overrides (which `mlflow run` gives, perhaps empty) taken apart."""
    if "--overrides" not in argv:
        return list(argv)
    at = argv.index("--overrides")
    try:
        return [*argv[:at], *(word for text in argv[at + 1 : at + 2] for word in shlex.split(text)), *argv[at + 2 :]]
    except ValueError as e:
        raise UserError(f"cannot read --overrides {argv[at + 1]!r}: {e}") from None


class user_errors:
    """`with user_errors():` ends the process with one line and status 2 where the user made a mistake."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UserError):
            fail(error)
        if isinstance(error, KeyboardInterrupt):
            sys.stderr.write("interrupted\n")
            sys.exit(130)


def fail(error: Exception) -> NoReturn:
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
    sys.stderr.flush()
    sys.exit(2)


def launch_hydra(stage: Callable[[Settings], None], argv: list[str]) -> None:
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    base = overlay(defaults(), read_params(ROOT / "params.yaml"))
    given = check_overrides([a for a in argv if not a.startswith("-")], base)
    clutter = {"run": {"dir": "."}, "output_subdir": None, "sweep": {"dir": "runs/multirun", "subdir": "${hydra:job.num}"}}
    quiet = [{"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}]
    ConfigStore.instance().store("pupil", {"defaults": ["_self_", *quiet], "hydra": clutter, **base})

    def job(cfg: Any) -> None:
        with user_errors():
            stage(resolve(typing.cast(dict[str, Any], OmegaConf.to_container(cfg)), given))

    sys.argv[1:] = argv
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(version_base=None, config_path=None, config_name="pupil")(job)()
    except (HydraException, OmegaConfBaseException) as e:
        raise UserError(str(e).splitlines()[0]) from None


def check_overrides(overrides: Sequence[str], base: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys that are overridden; unknown ones are refused with the nearest right name."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    keys = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            raise UserError(
                f"cannot read the override {text!r}; write key=value, such as optim.lr=0.1 or 'methods=[kd,crd]'"
            ) from None
        key = override.key_or_group
        if key.startswith("hydra"):
            continue
        known = all_keys(base)
        if override.is_delete() or key not in known:
            raise UserError(f"unknown key {key!r} in {text!r}{nearest(key, known)}")
        keys.append(key)
    return tuple(keys)


def from_json(args: Sequence[str]) -> Settings:
    """Settings from a resolved configuration and key=value overrides with JSON values; needs no Hydra."""
    if not args or not Path(args[0]).is_file():
        raise UserError(f"--config needs the file of a resolved configuration, got {' '.join(args[:1]) or 'nothing'}")
    try:
        given_tree = json.loads(Path(args[0]).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"--config {args[0]} is not JSON: {e}; python -m pupil resolve writes such a file") from None
    if not isinstance(given_tree, dict):
        raise UserError(f"--config {args[0]} must hold a JSON object, got {type(given_tree).__name__}")
    tree = overlay(defaults(), given_tree)
    given = []
    for text in args[1:]:
        key, eq, value = text.partition("=")
        known = all_keys(tree)
        if not eq or key not in known:
            raise UserError(f"unknown key {key!r} in {text!r}{nearest(key, known) if eq else '; write key=value'}")
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node[section]
        try:
            node[last] = json.loads(value)
        except json.JSONDecodeError:
            node[last] = value
        given.append(key)
    return resolve(tree, tuple(given))


def load_settings() -> Settings:
    """The settings of params.yaml alone."""
    return resolve(overlay(defaults(), read_params(ROOT / "params.yaml")))


def read_params(path: Path) -> dict[str, Any]:
    """params.yaml as plain values."""
    from omegaconf import OmegaConf

    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        raise UserError(f"{path.name} is not there: run inside a checkout of pupil") from None
    except Exception as e:  # whatever the YAML parser finds
        raise UserError(f"{path.name} is not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path.name} must hold `key: value` lines, got {type(tree).__name__}")
    refuse_interpolation(tree, path.name)
    return typing.cast(dict[str, Any], tree)


def refuse_interpolation(value: Any, where: str) -> None:
    """DVC hashes params.yaml as it is written: what `${...}` stands for could change unseen."""
    if isinstance(value, str) and "${" in value:
        raise UserError(f"{where}: {value!r} stands for another value, which DVC would not follow; write the value itself")
    for v in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        refuse_interpolation(v, where)


def pipeline_key() -> str:
    """What groups the runs of one pipeline: a hash of what params.yaml says, comments aside."""
    text = json.dumps(read_params(ROOT / "params.yaml"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def defaults() -> dict[str, Any]:
    tree = plain(Settings())
    del tree["given"]
    return tree


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


def resolve(tree: Mapping[str, Any], given: tuple[str, ...] = ()) -> Settings:
    """Plain values -> checked settings."""
    refuse_interpolation(tree, "settings")
    tree = overlay(defaults(), tree)  # once more: an override may have put a number where a section was
    hp = {name: convert(METHODS[name].Config, row, f"hp.{name}") for name, row in tree.pop("hp").items()}
    settings = dataclasses.replace(convert(Settings, tree, ""), hp=hp, given=given)
    check(settings)
    return settings


def convert(kind: Any, value: Any, path: str) -> Any:
    """`value` as `kind`: a dataclass, a tuple, a union or a plain type."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
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
    return "0, 1" if kind is int else "name"


def check(s: Settings) -> None:
    """Names are in the tables and numbers are possible; every stage refuses a bad page before it does anything."""
    one_of("data.name", s.data.name, SOURCES)
    for path, names, table in (
        ("teachers", s.teachers, NETWORKS),
        ("students", s.students, NETWORKS),
        ("methods", s.methods, METHODS),
        ("shkd", s.shkd, NETWORKS),
        ("train.network", (s.train.network,), NETWORKS),
        ("distill.teacher", (s.distill.teacher,), NETWORKS),
        ("distill.student", (s.distill.student,), NETWORKS),
        ("distill.method", (s.distill.method,), METHODS),
    ):
        for name in names:
            if name is not None:
                one_of(path, name, table)
    for path, values in (("teachers", s.teachers), ("students", s.students), ("methods", s.methods), ("seeds", s.seeds)):
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
    check_optim("optim", s.optim)
    check_optim("teacher.optim", s.teacher.optim)
    for name, hp in s.hp.items():
        within(f"hp.{name}.T", hp.T, hp.T > 0, "greater than 0")
        for weight in ("ce", "kl", "beta"):
            within(f"hp.{name}.{weight}", getattr(hp, weight), getattr(hp, weight) >= 0, "0 or more")
        if not (hp.ce or hp.kl or hp.beta):
            raise UserError(f"hp.{name}: ce, kl and beta are all 0, so there is nothing to train on")
    if s.device != "auto" and s.device.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"device: expected auto, cpu, cuda or cuda:N, got {s.device!r}")


def check_optim(path: str, o: Optim) -> None:
    within(f"{path}.epochs", o.epochs, o.epochs >= 1, "1 or more")
    within(f"{path}.batch_size", o.batch_size, o.batch_size >= 1, "1 or more")
    within(f"{path}.lr", o.lr, o.lr > 0, "greater than 0")
    within(f"{path}.momentum", o.momentum, 0 <= o.momentum < 1, "from 0 to below 1")
    within(f"{path}.weight_decay", o.weight_decay, o.weight_decay >= 0, "0 or more")
    within(f"{path}.gamma", o.gamma, 0 < o.gamma <= 1, "above 0, at most 1")
    one_of(f"{path}.schedule", o.schedule, ("step", "cosine"))
    if list(o.milestones) != sorted(set(o.milestones)) or any(m < 1 for m in o.milestones):
        raise UserError(f"{path}.milestones: expected epochs in rising order, got {list(o.milestones)}")
    if o.nesterov and not o.momentum:
        raise UserError(f"{path}.nesterov needs a momentum above 0, got {o.momentum}")


def within(path: str, value: Any, fine: bool, expected: str) -> None:
    if not fine:
        raise UserError(f"{path}: expected {expected}, got {value}")


def one_of(path: str, name: str, names: Any) -> None:
    if name not in names:
        close = get_close_matches(name, list(names), 1, 0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
        raise UserError(f"{path}: there is no {name!r}; {hint}")
