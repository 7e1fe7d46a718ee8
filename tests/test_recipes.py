"""Every recipe: is it in the published tables, does it fit the page, can what it names be built?"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from pupil import models
from pupil.config import read_params, resolve
from pupil.data import SOURCES
from pupil.methods import METHODS
from pupil.methods.base import Setup
from pupil.net import Net, probe
from pupil.recipes import applied, find, recipes, replace, shown, told, use
from pupil.settings import Settings, defaults, overlay
from pupil.tables import table
from pupil.types import Features, UserError
from tests.published import STANDARDISED, TABLES

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "params.yaml"
RECIPES = recipes()
SPLIT = {"kd": ("kd", "kd"), "kd+ls": ("kd", "ls"), "dkd": ("dkd", "dkd"), "dkd+ls": ("dkd", "ls")}
SPLIT |= {name: (name.replace("+", "-"), name.split("+")[0]) for name in ("ctkd", "ctkd+ls", "mlkd", "mlkd+ls")}
WITHOUT_NUMBERS = {"cskd", "headsharing", "simkd/imagenet"}  # their READMEs have none
TRAIN = {
    "cifar10": 50_000,
    "cifar100": 50_000,
    "cub200": 5_994,
    "cub200_refilled": 5_994,
    "mit67": 5_360,
    "imagenet": 1_281_167,
}


def numbers() -> dict[str, dict[str, str]]:
    """recipe -> column -> number, from the tables as published."""
    found: dict[str, dict[str, str]] = {}
    for name, text in {**TABLES, "ls/cifar100": STANDARDISED}.items():
        head, *rows = (line.split() for line in text.strip().splitlines())
        for pair, *cells in rows:
            for column, cell in zip(head[1:], cells, strict=True):
                where, key = (f"{name}-{SPLIT[column][0]}", SPLIT[column][1]) if name == "ls/cifar100" else (name, column)
                if cell != "-":
                    found.setdefault(f"{where}/{pair}", {})[key] = cell.replace("±", " ± ")
    return found


def column(key: str) -> str:
    return key.replace(", ", ",").replace(" ", "-")


# --- the tables -----------------------------------------------------------------------------------------------------------


def test_every_number_of_every_published_table_is_in_a_recipe_and_no_other() -> None:
    ours = {name: {column(k): shown(v) for k, v in r.published.items()} for name, r in RECIPES.items() if r.published}
    assert ours == numbers()
    silent = [name for name, r in RECIPES.items() if not r.published]
    assert {w for w in WITHOUT_NUMBERS if any(name.startswith(f"{w}/") for name in silent)} == WITHOUT_NUMBERS
    assert all(name.startswith(tuple(WITHOUT_NUMBERS)) for name in silent)


def test_a_recipe_trains_what_has_a_number() -> None:
    for name, recipe in RECIPES.items():
        heads = {key.split(",")[0] for key in recipe.published} - {"teacher", "student", "hkd"}
        assert set(recipe.settings["methods"]) == heads or not recipe.published, name
        assert recipe.settings["hp"].keys() == set(recipe.settings["methods"]), name
        assert all(isinstance(text, str) and len(text) > 8 for text in (recipe.source, recipe.reports, *recipe.lacks)), name


# --- the page -------------------------------------------------------------------------------------------------------------


def safe_load(text: str) -> Any:
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def comments(text: str) -> list[str]:
    return re.findall(r"(?:^|(?<=\s))#.*", text, re.MULTILINE)


@pytest.fixture(scope="module")
def settings() -> dict[str, Settings]:
    """Each recipe over the shipped page; every comment must be there still, and nothing else may have changed."""
    shipped, text, found = read_params(PAGE), PAGE.read_text(), {}
    for name, recipe in RECIPES.items():
        new, changes = applied(recipe, PAGE)
        assert comments(new) == comments(text), name
        tree = safe_load(new)
        assert differences(shipped, tree) == {change.split(": ")[0] for change in changes}, name
        assert differences(tree, over(tree, recipe.settings)) == set(), name
        found[name] = resolve(overlay(defaults(), tree))
    return found


def differences(a: Mapping[str, Any], b: Mapping[str, Any], path: str = "") -> set[str]:
    """Keys whose values are not the same; a method's row is one value."""
    assert a.keys() == b.keys()
    rows = {k for k in a if isinstance(a[k], dict) and path != "hp."}
    below = (differences(a[k], b[k], f"{path}{k}.") for k in rows)
    return {f"{path}{k}" for k in a.keys() - rows if a[k] != b[k]}.union(*below)


def over(tree: Mapping[str, Any], more: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """`more` on `tree`, section by section; a method's row is one value."""
    nested = {k: over(tree.get(k) or {}, v, f"{path}{k}.") for k, v in more.items() if isinstance(v, dict) and path != "hp."}
    return {**tree, **more, **nested}


@pytest.mark.slow
def test_every_recipe_fits_the_shipped_page(settings: dict[str, Settings]) -> None:
    assert settings.keys() == RECIPES.keys()
    for name, s in settings.items():
        assert f"{s.teachers[0]}-{s.students[0]}" == name.split("/")[2]
        kind = SOURCES[s.data.name]
        assert s.data.image_size in (kind.size, 224), name
        assert s.optim.epochs >= max(s.optim.milestones) or s.optim.schedule == "cosine", name
        assert s.data.val_images is None or s.data.val_images >= (kind.classes or 0), name


def test_recipes_follow_each_other_without_a_trace(tmp_path: Path) -> None:
    page = tmp_path / "params.yaml"
    shutil.copy(PAGE, page)
    last = RECIPES["ls/cifar100-mlkd/vgg13-vgg8"]
    alone = safe_load(applied(last, page)[0])
    before = ("cskd/cifar10/cskd_wrn_40_2-cskd_wrn_16_1", "headsharing/cifar100-shkd/resnet32x4-resnet8x4")
    for name in (
        *before,
        "ls/cifar100-mlkd-ls/vgg13-vgg8",
        "mdistiller/imagenet-dot/imagenet_resnet50-mobilenet_v1",
        last.name,
    ):
        use(name, page=page)
    after = read_params(page)
    for tree in (alone, after):
        tree["hp"] = tree["hp"]["mlkd"]  # other methods' rows stay as the last recipe for them has left them
    assert after == alone
    assert applied(last, page) == (page.read_text(), [])


@pytest.mark.slow
def test_the_authors_weights_and_learning_rates_arrive(settings: dict[str, Settings]) -> None:
    def of(name: str) -> Settings:
        return settings[name]

    s = of("repdistiller/cifar100/ResNet50-vgg8")
    assert (s.optim.lr, s.optim.epochs, s.optim.milestones, s.hp["ft"].init_lr) == (0.05, 240, (150, 180, 210), 0.0)  # type: ignore[attr-defined]
    assert (s.hp["kd"].ce, s.hp["kd"].kl, s.hp["crd"].beta, s.hp["crd"].k) == (0.1, 0.9, 0.8, 16384)  # type: ignore[attr-defined]
    assert not s.protocol.papers_best_on_test
    s = of("repdistiller/cifar100/vgg13-MobileNetV2")
    assert (s.optim.lr, s.teacher.optim.lr, s.hp["ft"].init_lr) == (0.01, 0.05, 0.01)  # type: ignore[attr-defined]
    s = of("simkd/cifar100/resnet32x4-ShuffleV2_1_5")
    assert (s.optim.lr, s.hp["kd"].ce, s.hp["kd"].kl, s.hp["simkd"].factor) == (0.01, 1, 1, 2)  # type: ignore[attr-defined]
    s = of("ls/cifar100-dkd/resnet56-resnet20")
    assert (s.hp["dkd"].beta, s.hp["ls"].T, s.hp["ls"].beta, s.hp["ls"].of_beta) == (2, 3, 18, 2)  # type: ignore[attr-defined]
    s = of("ls/cifar100-mlkd-ls/resnet32x4-ShuffleV2")
    assert (s.optim.lr, s.optim.epochs, s.hp["mlkd"].beta, s.hp["mlkd"].T) == (0.01, 960, 6, 2)
    s = of("mdistiller/imagenet-dot/imagenet_resnet34-imagenet_resnet18")
    assert (s.optim.optimizer, s.optim.dot_delta, s.optim.lr, s.optim.batch_size) == ("dot", 0.09, 0.2, 512)
    assert (s.teacher.optim.optimizer, s.hp["kd"].ce, s.hp["kd"].T) == ("sgd", 0.5, 1)
    s = of("refilled/cub200/mobilenet_v1-mobilenet_v1_x0_5")
    assert (s.optim.nesterov, s.optim.gamma, s.optim.milestones) == (True, 0.2, (100, 140, 180))


# --- building -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_everything_that_recipes_name_can_be_built(settings: dict[str, Settings]) -> None:
    """On the meta device: shapes without numbers, at the data's own size and with its classes."""
    networks: dict[tuple[str, int, int], tuple[Net, Features]] = {}
    built: set[tuple[Any, ...]] = set()

    def network(name: str, classes: int, size: int) -> tuple[Net, Features]:
        if (name, classes, size) not in networks:
            net = models.build(name, classes, size)
            networks[name, classes, size] = net, probe(net, size)
        return networks[name, classes, size]

    with torch.device("meta"):
        for name, s in settings.items():
            classes, labels = labels_of(s)
            (teacher, t), (student, f) = (network(n, classes, s.data.image_size) for n in (s.teachers[0], s.students[0]))
            for method in s.methods:
                what = s.teachers, s.students, method, s.hp[method], s.data.image_size, classes
                if what not in built:
                    try:
                        made = METHODS[method](Setup(student, teacher, f, t, labels, s.optim.batch_size), s.hp[method])
                    except UserError as e:
                        raise AssertionError(f"{name}: {method}: {e}") from None
                    assert made.phases()
                    built.add(what)
    assert len(built) > 500


def labels_of(s: Settings) -> tuple[int, Tensor]:
    total = SOURCES[s.data.name].classes or 0
    classes = s.data.classes if isinstance(s.data.classes, int) else total
    images = TRAIN.get(s.data.name, 100_000) * classes // total
    return classes, torch.arange(images, device="cpu") % classes


# --- the command ----------------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'simkd/cifar100/resnet32x4-resnet8x4'"):
        find("simkd/cifar100/resnet32x4-resnet8")
    with pytest.raises(UserError, match="did you mean"):
        use("simkd/cifar1000", dry=True)


def test_a_page_that_would_be_impossible_stays_as_it_was(tmp_path: Path) -> None:
    page = tmp_path / "params.yaml"
    page.write_text(PAGE.read_text().replace("device: auto", "device: tpu"))
    before = page.read_text()
    with pytest.raises(UserError, match="device"):
        use("simkd/cifar100/resnet32x4-resnet8x4", page=page)
    assert page.read_text() == before
    assert list(tmp_path.iterdir()) == [page]
    with pytest.raises(UserError):
        replace(page, "teachers: [")
    assert page.read_text() == before
    assert list(tmp_path.iterdir()) == [page]


def test_the_command_says_what_changes_and_shows_what_was_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, name = tmp_path / "params.yaml", "dist/cifar100/ResNet50-MobileNetV2"
    page.write_text(PAGE.read_text().replace("path: null", "path: old.zip", 1))
    use(name, dry=True, page=page)
    shown_first = capsys.readouterr().out
    assert "old.zip" in page.read_text()
    assert "name: digits" in page.read_text()
    use(name, page=page)
    out = capsys.readouterr().out
    for text in (shown_first, out):
        assert "optim.lr: 0.05 -> 0.01" in text
        assert "data.name: digits -> cifar100" in text
        assert "dist 68.66 ± 0.23" in text
        assert "kept: data.path: old.zip" in text
    use(name, page=page)
    assert "says all of this already" in capsys.readouterr().out
    use("dist")
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("  dist/") for line in lines) == 14
    assert sum(line.startswith("  simkd/") for line in lines) == 0


def test_the_comparison_shows_published_numbers_beside_ones_own() -> None:
    published = told("simkd/cifar100/resnet32x4-resnet8x4")
    assert published["resnet32x4"] == "79.42"
    assert published["resnet8x4 alone"] == "73.09"
    assert published["resnet8x4 by simkd from resnet32x4"] == "78.08"
    assert told(None) == {}
    spread = {"n": 1, "mean": 70.0, "std": 0.0}
    costs = {"parameters": 1.0, "macs": 1.0, "cpu_batch1_median_ms": 1.0, "cpu_batch64_median_ms": 1.0}
    mine = {name: {"top1": spread, "nll": spread, "ece": spread, **costs} for name in ("resnet8x4 alone", "another")}
    head, _, first, second, *_ = table(mine, {}, published).splitlines()
    at = [cell.strip() for cell in head.split("|")].index("published")
    assert [line.split("|")[at].strip() for line in (first, second)] == ["73.09", ""]
    assert "published" not in table(mine, {})
    with pytest.raises(UserError, match="there is no recipe 'simkd/cifar10'"):
        told("simkd/cifar10")
