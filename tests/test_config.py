"""params.yaml, the schema, overrides, and what dvc.yaml depends on."""

import ast
import dataclasses
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from pupil import report
from pupil import settings as settings_of
from pupil.config import from_json, launch_with, load_settings, read_params, resolve, words
from pupil.methods import METHODS
from pupil.methods.fitnet import FitNet
from pupil.methods.wrapping import Wrapper
from pupil.settings import Settings, configured, defaults, overlay, plain
from pupil.types import UserError

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
PAGE = read_params(ROOT / "params.yaml")
NOT_ON_THE_PAGE = {"train", "distill", "prepared", "out", "record"}  # which cell, and where: dvc.yaml or the command line
OWN_DEFAULTS = {"crd": {"k"}, "crdth": {"k"}}  # said in params.yaml's comment: the authors' number needs a large training set


def keys(tree: Any, path: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{path}{key}"
        if isinstance(value, dict):
            yield from keys(value, f"{path}{key}.")


# --- the page -------------------------------------------------------------------------------------------------------------


def test_params_yaml_lists_every_setting_and_no_other() -> None:
    everything = {key for key in keys(defaults()) if key.split(".")[0] not in NOT_ON_THE_PAGE}
    values = {key for key in everything if key.count(".") == 2 and key.startswith("hp.")}  # a preset's, unless given
    assert everything - values <= set(keys(PAGE)) <= everything


def test_params_yaml_holds_values_and_no_references() -> None:
    """DVC hashes the text: a reference could change its meaning unseen."""
    lines = (ROOT / "params.yaml").read_text().splitlines()
    assert not [line for line in lines if "${" in line or re.search(r"(?<!\S)[&*]\w", line.split("#")[0])]


def test_every_method_has_its_authors_values_on_the_page() -> None:
    assert PAGE["hp"].keys() == METHODS.keys()
    for name, method in METHODS.items():
        ours, theirs = plain(configured(name, PAGE["hp"][name])), plain(method.Config())
        apart = {key for key in theirs if ours[key] != theirs[key]}
        assert apart == OWN_DEFAULTS.get(name, set()), name


def test_a_value_wins_over_its_preset_and_the_preset_over_the_default() -> None:
    base, simkd = FitNet.Config(), FitNet.presets["simkd"]
    row = configured("fitnet", {"preset": "simkd", "beta": 7, "T": None})
    assert plain(row) == plain(base) | dict(simkd) | {"preset": "simkd", "beta": 7.0}
    assert configured("fitnet", {}) == configured("fitnet", {"preset": "default"}) == base
    with pytest.raises(UserError, match=r"hp.fitnet.preset: there is no 'sim'; known: default, "):
        configured("fitnet", {"preset": "sim"})


@pytest.mark.parametrize("name", METHODS)
def test_every_preset_is_a_possible_setting(name: str) -> None:
    for preset, values in METHODS[name].presets.items():
        assert values.keys() <= plain(METHODS[name].Config()).keys() - {"preset"}
        assert configured(name, {"preset": preset}).preset == preset


def test_the_page_is_the_same_for_dvc_and_for_us() -> None:
    """DVC reads YAML 1.2, where `no` is a text and 010 is ten."""
    assert yaml.safe_load((ROOT / "params.yaml").read_text()) == PAGE
    assert load_settings() == resolve(overlay(defaults(), PAGE))


# --- overrides ------------------------------------------------------------------------------------------------------------


def settings(*overrides: str) -> Settings:
    """By way of Hydra."""
    found: list[Settings] = []
    GlobalHydra.instance().clear()
    launch_with(overrides, found.append)
    (one,) = found
    return one


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["pupil"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.chdir(tmp_path)


def test_overrides_have_types_and_are_remembered() -> None:
    s = settings("optim.lr=5e-4", "optim.epochs=3", "methods=[kd,crd]", "data.classes=[0,cat]", "hp.simkd.factor=4")
    assert (s.optim.lr, s.optim.epochs, s.methods, s.data.classes) == (5e-4, 3, ("kd", "crd"), (0, "cat"))
    assert s.hp["simkd"] == METHODS["simkd"].Config(factor=4)  # type: ignore[call-arg]
    assert s.given == ("optim.lr", "optim.epochs", "methods", "data.classes", "hp.simkd.factor")
    assert load_settings().given == ()


def test_a_whole_number_is_a_number() -> None:
    lr = settings("optim.lr=1").optim.lr
    assert (lr, type(lr)) == (1.0, float)


@pytest.mark.parametrize("key", sorted(PAGE))
def test_every_top_level_key_can_be_overridden_with_what_it_has(key: str) -> None:
    """Hydra takes a key for a group of options where a folder of that name is on its path."""
    value = json.dumps(PAGE[key], separators=(",", ":")).replace('"', "")
    assert settings(f"{key}={value}") == dataclasses.replace(load_settings(), given=(key,))


def test_scientific_notation_on_the_page_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("optim: {lr: 5e-4, weight_decay: 1e-3}\n")
    tree = read_params(tmp_path / "params.yaml")
    assert tree == {"optim": {"lr": 0.0005, "weight_decay": 0.001}}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["a=1", "b=2"], ["a=1", "b=2"]),
        (["--overrides", "a=1 'b=[x, y]'"], ["a=1", "b=[x, y]"]),
        (["c=3", "--overrides", "a=1", "d=4"], ["c=3", "a=1", "d=4"]),
        (["--overrides", ""], []),
        (["--overrides"], []),
    ],
)
def test_overrides_in_one_word_are_taken_apart(argv: list[str], expected: list[str]) -> None:
    assert words(argv) == expected


def test_overrides_in_one_word_reach_the_settings() -> None:
    s = settings("--overrides", "optim.lr=0.3 methods=[crd]")
    assert (s.optim.lr, s.methods) == (0.3, ("crd",))


def test_a_resolved_configuration_gives_the_same_settings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    more = ("optim.lr=0.01", "data.classes=[1,2]", "train.seed=3", "hp.crd.k=7")
    settings_before = settings(*more)
    launch_with(more, lambda s: print(json.dumps({k: v for k, v in plain(s).items() if k != "given"})))
    (tmp_path / "box.json").write_text(capsys.readouterr().out)
    assert from_json([str(tmp_path / "box.json")]) == dataclasses.replace(settings_before, given=())
    again = from_json([str(tmp_path / "box.json"), "optim.lr=1e-3", 'methods=["crd"]', "train.network=resnet20"])
    assert (again.optim.lr, again.methods, again.train.network) == (1e-3, ("crd",), "resnet20")
    assert again.given == ("optim.lr", "methods", "train.network")


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_settings().optim.lr = 1.0  # type: ignore[misc]


def test_a_key_that_the_stage_does_not_read_is_refused() -> None:
    s = dataclasses.replace(load_settings(), given=("optim.lr", "device", "out"))
    s.refuse_unused("optim")
    with pytest.raises(UserError, match=r"optim\.lr has no effect"):
        s.refuse_unused("optimal", "optim.lrx", "data")


# --- dvc.yaml: what a stage depends on ------------------------------------------------------------------------------------

DVC: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
COMMAND = {name: stage["cmd"] if isinstance(stage["cmd"], str) else stage["cmd"][-1] for name, stage in DVC.items()}
TRAINING = [name for name, command in COMMAND.items() if re.search(r"stages/(train|distill|table)\.py", command)]
NOT_A_DEPENDENCY = {  # cannot change the weights that a training leaves, or do so through another dependency
    "__init__.py": "holds the version alone",
    "config.py": "reads the settings; DVC follows their values",
    "settings.py": "reads the settings; DVC follows their values",
    "checks.py": "refuses settings, changes none",
    "errors.py": "what a mistake is told by",
    "record.py": "writes what is measured",
    "tracking/": "sends records to MLflow",
    "serve.py": "packs a finished network for MLflow",
    "progress.py": "a bar",
    "opening.py": "words for the record",
    "places.py": "where a training writes",
    "faults.py": "words for what went wrong",
    "room.py": "words for what would fit",
    "sealed.py": "checksums in JSON files",
    "points.py": "what a killed training goes on from, checked by its hash",
    "resume.py": "when and where that is kept",
    "machine.py": "words and measurements for the record",
    "distributed.py": "starts and joins processes, whose numbers are those of one",
    "divided.py": "the same numbers by several processes",
    "figures.py": "pictures of finished runs",
    "measures.py": "numbers about finished runs; evaluate computes them again and depends on it",
    "arrays.py": "writes safetensors",
    "data/__init__.py": "preparation: its effect is out/data",
    "data/base.py": "preparation",
    "data/classes.py": "preparation",
    "data/decode.py": "preparation",
    "data/files.py": "reads out/data, whose hash is checked",
    "data/memory.py": "chooses between loaders of the same batches, up to rounding in decoded images",
    "sweep.py": "says where jobs run",
    "data/draw.py": "preparation",
    "data/folder.py": "preparation",
    "data/gather.py": "preparation",
    "data/layouts.py": "preparation",
    "data/prepare.py": "preparation, and the reader of out/data, checked by the hashes in the manifest",
    "data/unchanged.py": "refuses data that change in a training",
    "data/report.py": "describes what was prepared",
    "data/samples.py": "preparation",
    "data/shards.py": "preparation",
    "data/sources.py": "preparation",
    "data/tar.py": "preparation",
    "data/tree.py": "preparation",
    "data/limits.py": "preparation",
    "data/manifest.py": "the reader of out/data, checked by the hashes in the manifest",
    "aliases.py": "refuses a page, reads none",
    "disk.py": "words about what the system refuses",
    "driver.py": "whether there is a GPU that torch does not see",
    "facts.py": "what a file that is read can say",
    "installed.py": "which packages there are; requirements.txt is a dependency",
    "jsonfile.py": "reads JSON, with a limit",
    "names.py": "refuses names, changes none",
    "needed.py": "which packages are missing",
    "methods/__init__.py": "the table: a new row changes no other method",
}


def imports(path: Path) -> set[Path]:
    """The files of pupil that a file imports, anywhere in it."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            base = SRC / Path(*name.split("."))
            found |= {p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file() and name.startswith("pupil")}
    return found


def reached(path: Path) -> set[str]:
    """Every file of pupil behind a stage script, relative to src/pupil."""
    seen: set[Path] = set()
    todo = {path}
    while todo:
        here = todo.pop()
        seen.add(here)
        todo |= imports(here) - seen
    return {p.relative_to(SRC / "pupil").as_posix() for p in seen - {path}}


@pytest.mark.parametrize("stage", TRAINING)
def test_a_training_depends_on_all_code_that_can_change_its_result(stage: str) -> None:
    script = re.findall(r"stages/\w+\.py", COMMAND[stage])[0]
    deps = [dep for dep in DVC[stage]["deps"] if dep.startswith("src/pupil/")]
    covered = [dep.removeprefix("src/pupil/") for dep in deps]
    distills = script == "stages/distill.py"
    own = {f"methods/{name}.py" for name in METHODS}
    others = own | (
        {"methods/alone.py"}
        if distills
        else {f"methods/{shared}.py" for shared in ("adapters", "contrast", "heads", "midway", "routing", "wrapping")}
    )
    for name in reached(ROOT / script):
        excused = any(name == n or (n.endswith("/") and name.startswith(n)) for n in NOT_A_DEPENDENCY)
        inside = any(name == dep or name.startswith(dep + "/") for dep in covered)
        assert inside or excused or name in others, f"{stage} does not depend on {name}"
        assert not (inside and excused) or "methods" in covered, f"{stage} depends on {name} for nothing"
    assert {script, "requirements.txt", "out/data"} <= set(DVC[stage]["deps"])
    assert ("src/pupil/methods/${item.method}.py" in deps) == distills
    assert {f"src/pupil/methods/${{hp.{name}.of}}.py" for name in ("ls", "ctkd", "sakd")} <= set(deps) or not distills
    assert "src/pupil/methods/${hp.refilled.then}.py" in deps or not distills
    assert not [dep for dep in deps if "${" not in dep and not (ROOT / dep).exists()]


def test_names_are_looked_at_before_dvc_writes_them_into_a_command() -> None:
    for name, stage in DVC.items():
        if "${" in str(stage["cmd"]):
            assert stage["cmd"][0] == "python stages/names.py", name
            assert len(stage["cmd"]) == 2
            assert set(re.findall(r"\$\{(\w+)", COMMAND[name])) <= {"item", "seeds"}
            lists = {*stage["matrix"].values(), "${seeds}"}
            assert lists <= {f"${{{key}}}" for key in runpy.run_path(str(ROOT / "stages/names.py"))["KEYS"]}


def test_a_method_imports_no_other_method() -> None:
    """Else a cell would have to depend on more than its own file."""
    for name in METHODS:
        if issubclass(METHODS[name].Config, Wrapper) or name == "refilled":
            continue  # dvc.yaml follows what it wraps, or what comes after
        others = {f"methods/{other}.py" for other in METHODS if other != name}
        assert not reached(SRC / "pupil/methods" / f"{name}.py") & others, name


def test_a_method_is_found_under_its_name() -> None:
    for name, method in METHODS.items():
        assert method.__module__ == f"pupil.methods.{name}"


@pytest.mark.parametrize("stage", list(DVC))
def test_a_stage_writes_where_dvc_and_the_report_look(stage: str) -> None:
    outs = [out if isinstance(out, str) else next(iter(out)) for out in DVC[stage]["outs"]]
    given = dict(re.findall(r"\b(out|record)=(\S+)", COMMAND[stage]))
    assert list(given.values()) == [out for out in outs if out.startswith("out/")]
    if stage in TRAINING:
        assert given["record"] == given["out"].replace("out/models/", "out/records/")


TABLES = {"tables": [{"name": "maps", "methods": ["at", "sp"]}, {"name": "rest", "methods": ["rkd"]}]}


def test_the_report_looks_for_what_the_stages_write() -> None:
    s = resolve(
        overlay(
            defaults(), PAGE | {"teachers": ["wrn_16_1", "resnet20"], "methods": ["kd", "crd"], "shkd": ["resnet14"]} | TABLES
        )
    )
    written = set()
    for stage in TRAINING:
        cell, matrix = dict(re.findall(r"\b(out|record)=(\S+)", COMMAND[stage]))["out"], DVC[stage]["matrix"]
        combinations: list[dict[str, Any]] = [{}]
        for axis, source in matrix.items():
            values = getattr(s, source[2:-1])
            combinations = [{**c, axis: v} for c in combinations for v in values]
        for c in combinations:
            path = re.sub(r"\$\{item\.(\w+)\}", lambda m, c=c: str(c[m[1]]), cell.replace("table.name", "table"))
            names = [str(path)] if "table" not in c else [path.replace(str(c["table"]), c["table"].name)]
            written.update(
                f"{name}/{m}" if "table" in c else name for name in names for m in getattr(c.get("table"), "methods", [""])
            )
    assert {str(cell.folder) for cell in report.cells(s)} == written
    assert not [path for path in written if "$" in path]


@pytest.mark.parametrize("stage", list(DVC))
def test_a_stage_follows_settings_that_exist(stage: str) -> None:
    known = set(keys(PAGE)) | {"hp.${item.method}"}
    assert set(DVC[stage]["params"]) <= known
    assert not {"device", "experiment"} & set(DVC[stage]["params"]), "these change no result"


# --- who may import what --------------------------------------------------------------------------------------------------

BANNED = {
    "mlflow": lambda name: name.startswith("tracking/") or name == "serve.py",
    "hydra": lambda name: name == "config.py",
    "omegaconf": lambda name: name == "config.py",
    "dvc": lambda name: False,
    "dvclive": lambda name: False,
}


@pytest.mark.parametrize("package", list(BANNED))
def test_a_package_is_imported_only_where_it_belongs(package: str) -> None:
    for path in [*(SRC / "pupil").rglob("*.py"), *(ROOT / "stages").glob("*.py")]:
        name = path.relative_to(SRC / "pupil").as_posix() if path.is_relative_to(SRC) else path.name
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert BANNED[package](name) or package not in {n.split(".")[0] for n in names}, f"{path}:{node.lineno}"  # type: ignore[attr-defined]


def test_the_core_imports_nothing_heavy() -> None:
    files = [p.relative_to(SRC).with_suffix("") for p in sorted((SRC / "pupil").rglob("*.py")) if p.name != "serve.py"]
    modules = [".".join(p.parts).removesuffix(".__init__") for p in files]
    assert {"pupil.fit", "pupil.session", "pupil.tracking.mirror"} <= set(modules)
    heavy = ("mlflow", "hydra", "omegaconf", "dvc", "sklearn", "matplotlib", "nvidia.dali", "scipy", "psutil", "yaml")
    code = f"import importlib, sys\nfor m in {modules}: importlib.import_module(m)\nprint(set({heavy}) & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(SRC)}
    )
    assert done.stdout.strip() == "set()"


def test_the_nearest_right_name_is_offered() -> None:
    assert settings_of.nearest("optim.lrr", ["optim.lr", "data"]) == "; did you mean 'optim.lr'?"
    assert settings_of.nearest("zzz", ["optim.lr", "data"]) == "; known: data, optim"


def test_mlflow_s_own_environment_finds_the_package() -> None:
    """There the package is not installed: stage scripts find it themselves, the command line must be told."""
    project = yaml.safe_load((ROOT / "MLproject").read_text())
    for name, entry in project["entry_points"].items():
        command = entry["command"]
        assert command.startswith(("python stages/", "PYTHONPATH=src python -m pupil")), name
        assert "eval" not in command.split(), f"{name}: no shell is built from a parameter"
