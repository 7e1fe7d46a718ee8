"""The command that runs a recorded run again, and the files it needs."""

import json
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pupil import record
from pupil.checkpoint import WEIGHTS
from pupil.config import HOME, load_settings, read_params, resolve
from pupil.settings import defaults, overlay, plain
from pupil.trace import Found, Records, shown
from pupil.types import UserError

SCRIPTS = {"prepare": "prepare", "distill": "distill", "evaluate": "evaluate"}  # the others are trained by stages/train.py
OF_A_CELL = ("train", "distill", "out", "record", "given")  # what dvc.yaml gives on the command line
NOT_OF_THE_RESULT = (*OF_A_CELL, "experiment", "prepared")


class Again(NamedTuple):
    """How a run is repeated."""

    command: str
    config: dict[str, Any] | None  # the whole configuration, as the record keeps it
    known: bool  # whether the commit that the code came from is in this repository
    same_code: bool | None  # whether the code here is that of the run; None: the record does not say


def again(found: Found, records: Records) -> Again:
    """In the checkout's root; what it needs is written below .work/why."""
    facts, env = found.facts, found.facts.get("environment") or {}
    config, commit = configuration(found), env.get("git_commit")
    same = env["code"] == record.code() if "code" in env else None
    known = commit is not None and record.git("cat-file", "-e", f"{commit}^{{commit}}") is not None
    moves = known and not same and commit != record.git("rev-parse", "HEAD")
    words = [f"git checkout {commit}"] if moves else []
    stage = (facts.get("tags") or {}).get("dvc.stage")
    if stage is not None:
        page = without(config or {}, OF_A_CELL)
        if config is not None and not says(page, commit if moves else None):
            words.append(f"cp {keep(facts['uid'], 'params.yaml', page)} params.yaml")
        words.append(f"dvc repro {shlex.quote(stage)}")
    else:
        script = SCRIPTS.get(facts["stage"], "train")
        tree = config if config is not None else rebuilt(facts)
        file = keep(facts["uid"], "config.json", tree)
        arguments = ["--config", file, "out=null", "record=null", *ancestors(found, tree, records)]
        words.append(f"python stages/{script}.py {shlex.join(arguments)}")
    return Again(" && ".join(words), config, known, same)


def configuration(found: Found) -> dict[str, Any] | None:
    """The whole resolved configuration, of records of networks."""
    try:
        tree = json.loads((found.folder / "artifacts" / "config.json").read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{found.folder / 'artifacts' / 'config.json'} is damaged: it is not JSON") from None
    return tree if isinstance(tree, dict) else None


def rebuilt(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What `prepare` and `evaluate` read, from the parameters of their records."""
    params = facts["params"]
    if facts["stage"] == "prepare":
        return {"data": {key.removeprefix("data."): value for key, value in params.items() if key.startswith("data.")}}
    lists = {key: [word for word in str(value).split(", ") if word] for key, value in params.items()}
    return lists | {"seeds": [int(seed) for seed in lists.get("seeds", [])]}


def ancestors(found: Found, config: Mapping[str, Any], records: Records) -> list[str]:
    """Overrides for a teacher, or a lender of a head, that no longer lies where the configuration says."""
    teacher, stage = found.facts.get("teacher"), found.facts["stage"]
    if teacher is None or (source := records.of_weights(teacher["sha256"], teacher.get("uid"))) is None:
        return []
    section, key = ("distill", "checkpoint") if stage == "distill" else ("train", "head_of")
    given = (config.get(section) or {}).get(key)
    folder = model_of(source)
    if folder is None or (given and weights_in(HOME / given) == teacher["sha256"]):
        return []
    return [f"{section}.{key}={shown(folder)}"]


def model_of(found: Found) -> Path | None:
    """The model folder of a record, while the weights in it are those that the run left."""
    there = found.model is not None and found.weights is not None and weights_in(found.model) == found.weights
    return found.model if there else None


def weights_in(folder: Path) -> str | None:
    return record.sha256(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else None


def keep(uid: str, name: str, tree: Mapping[str, Any]) -> str:
    """Writes a file that the command reads; JSON is YAML too."""
    path = HOME / ".work" / "why" / uid / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=1) + "\n")
    return shlex.quote(shown(path))


def params_at(commit: str | None) -> dict[str, Any]:
    """The page of settings at a commit (None: as it is now), resolved as a stage would."""
    if commit is None:
        return plain(load_settings())
    text = record.git("show", f"{commit}:params.yaml")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.yaml"
        path.write_text(text or "{}")
        return plain(resolve(overlay(defaults(), read_params(path))))


def says(page: Mapping[str, Any], commit: str | None) -> bool:
    """Whether params.yaml gives these settings."""
    try:
        return differences(page, params_at(commit)) == []
    except UserError:  # it cannot be read
        return False


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value then, value now) of every setting that differs and can change a result."""
    a, b = (record.flatten(without(tree, NOT_OF_THE_RESULT)) for tree in (then, now))
    missing = object()
    rows = ((key, a.get(key, missing), b.get(key, missing)) for key in dict.fromkeys([*a, *b]))
    return [(key, "unset" if x is missing else x, "unset" if y is missing else y) for key, x, y in rows if x != y]


def without(tree: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key not in keys}
