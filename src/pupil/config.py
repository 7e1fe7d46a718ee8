"""Configuration: params.yaml -> Hydra -> plain frozen dataclasses.  The only file that imports hydra and omegaconf.

params.yaml is loaded here and given to Hydra through its ConfigStore, so every stage script takes overrides and `-m`.
On a machine without Hydra a stage runs from a resolved configuration: `python stages/train.py --config FILE.json
optim.epochs=2` (`python -m pupil resolve > FILE.json` writes one).
"""

import dataclasses
import hashlib
import json
import os
import shlex
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from pupil import disk, distributed
from pupil.checks import check
from pupil.jsonfile import read_json
from pupil.resume import AGAIN, Stopped
from pupil.settings import Settings, all_keys, configured, convert, defaults, nearest, overlay
from pupil.types import UserError

ROOT = Path(__file__).resolve().parents[2]  # where the code is
MOST = 1 << 20  # bytes of a page of settings
HOME = Path(os.environ.get("DVC_ROOT", ROOT))  # the real checkout, also inside a copy that DVC made


def launch(stage: Callable[[Settings], None]) -> None:
    """Run a stage script: settings from params.yaml and the command line; a user's mistake is one line and status 2."""
    distributed.hush()
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


@contextmanager
def user_errors() -> Iterator[None]:
    """Ends the process with one line and status 2 where the user made a mistake."""
    try:
        yield
    except UserError as e:
        fail(e)
    except Stopped as e:
        sys.stderr.write(f"{e}\n")
        sys.exit(AGAIN)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ModuleNotFoundError as e:
        if e.name is None or e.name.partition(".")[0] == "pupil":
            raise
        fail(UserError(f"{e.name} is not installed here: `make setup`; `python -m pupil doctor` says what else is missing"))
    except OSError as e:
        if (line := disk.told(e)) is None:
            distributed.give_way()
            raise
        fail(UserError(line))
    except Exception:
        distributed.give_way()
        raise


def fail(error: Exception) -> NoReturn:
    distributed.give_way()
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
    sys.stderr.flush()
    sys.exit(2)


def launch_hydra(stage: Callable[[Settings], None], argv: list[str]) -> None:
    try:
        import hydra
        from hydra.core.config_store import ConfigStore
        from hydra.errors import HydraException
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
    except ModuleNotFoundError as e:
        raise UserError(f"{e}: give --config FILE.json first, which `python -m pupil resolve` writes where Hydra is") from None

    base = overlay(defaults(), read_params(ROOT / "params.yaml"))
    given = check_overrides([a for a in argv if not a.startswith("-")], base)
    clutter = {"run": {"dir": "."}, "output_subdir": None, "sweep": {"dir": "runs/multirun", "subdir": "${hydra:job.num}"}}
    quiet = [{"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}]
    ConfigStore.instance().store("pupil", {"defaults": ["_self_", *quiet], "hydra": clutter, **base})

    def job(cfg: Any) -> None:
        with user_errors():
            stage(resolve(typing.cast(dict[str, Any], OmegaConf.to_container(cfg)), given))

    job.__module__ = "__main__"  # else Hydra takes the folders of src/pupil for option groups and refuses methods=[kd]
    sys.argv[1:] = argv
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(version_base=None, config_path=None, config_name="pupil")(job)()
    except (HydraException, OmegaConfBaseException) as e:
        raise UserError(str(e)) from None


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
        if isinstance(section := override.value(), dict):  # optim={lr: 0.1}
            keys_below(base, key, section)
        keys.append(key)
    return tuple(keys)


def keys_below(base: Mapping[str, Any], key: str, section: Mapping[str, Any]) -> None:
    """Refuses keys that the section lacks."""
    for name in key.split("."):
        base = base[name]
    if isinstance(base, Mapping):
        overlay(base, section, f"{key}.")


def from_json(args: Sequence[str]) -> Settings:
    """Settings from a resolved configuration and key=value overrides with JSON values; needs no Hydra."""
    if not args or not Path(args[0]).is_file():
        raise UserError(f"--config needs the file of a resolved configuration, got {' '.join(args[:1]) or 'nothing'}")
    try:
        given_tree = read_json(Path(args[0]))
    except ValueError as e:
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
        if key.startswith("hp.") and last == "preset":  # the file gives every value, which would win over the preset
            node |= dict.fromkeys(node.keys() - {"preset"})
        given.append(key)
    return resolve(tree, tuple(given))


def load_settings() -> Settings:
    """The settings of params.yaml alone."""
    return resolve(overlay(defaults(), read_params(ROOT / "params.yaml")))


def read_params(path: Path) -> dict[str, Any]:
    """params.yaml as plain values."""
    from omegaconf import OmegaConf

    if path.is_file() and path.stat().st_size > MOST:
        raise UserError(f"{path.name} has {path.stat().st_size} bytes, more than {MOST}: it is no page of settings")
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


def resolve(tree: Mapping[str, Any], given: tuple[str, ...] = ()) -> Settings:
    """Plain values -> checked settings."""
    refuse_interpolation(tree, "settings")
    tree = overlay(defaults(), tree)  # once more: an override may have put a number where a section was
    hp = {name: configured(name, row) for name, row in tree.pop("hp").items()}
    settings = dataclasses.replace(convert(Settings, tree, ""), hp=hp, given=given)
    check(settings)
    return settings
