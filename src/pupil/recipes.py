"""Recipes: how the authors trained each pair of their tables, as overlays over params.yaml, beside what they published.

recipes/SYSTEM/TABLE.yaml is one published table (or one suite's scripts, where its authors published none) and holds
    source    where the numbers stand
    reports   which accuracy they are
    lacks     where the settings do not do as the authors did
    settings  the overlay that all pairs share, over recipes/base.yaml
    but       patterns of pairs -> an overlay more, such as "*-MobileNetV2 *-Shuffle*": {optim: {lr: 0.01}}
    pairs     TEACHER-STUDENT -> published numbers by "teacher", "student", method, and "simkd, factor 4" or the like for a
              method under other settings; the pair's methods are those, unless settings.methods names them
and `{pair}` in a preset's name stands for the pair.  A recipe's name is SYSTEM/TABLE/TEACHER-STUDENT.
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from pupil.config import ROOT, read_params, resolve
from pupil.rewrite import rewrite
from pupil.settings import defaults, overlay
from pupil.types import UserError


@dataclass(frozen=True)
class Recipe:
    """One pair of one table."""

    name: str
    source: str
    reports: str
    lacks: tuple[str, ...]
    settings: Mapping[str, Any]  # over params.yaml
    published: Mapping[str, float | str]  # top-1 in percent of teacher, student and methods; a text where there is a deviation


def recipes() -> dict[str, Recipe]:
    """Every recipe by its name."""
    folder = ROOT / "recipes"
    paths = sorted(folder.glob("*/*.yaml"))
    return {recipe.name: recipe for path in paths for recipe in table(path.relative_to(folder).with_suffix(""), folder)}


@cache
def table(name: Path, folder: Path) -> tuple[Recipe, ...]:
    base, page = read_params(folder / "base.yaml"), read_params((folder / name).with_suffix(".yaml"))
    found = []
    for pair, published in page["pairs"].items():
        teacher, student = pair.split("-")
        taught = [key for key in published if key in page["settings"]["hp"]]
        settings = {"teachers": [teacher], "students": [student], "methods": taught} | base
        exceptions = [more for names, more in page.get("but", {}).items() if any(fnmatchcase(pair, n) for n in names.split())]
        for more in (page["settings"], *exceptions):
            settings = laid(settings, more)
        settings["hp"] = {method: named(settings["hp"][method], pair) for method in settings["methods"]}
        about = page["source"], page["reports"], tuple(page.get("lacks", ()))
        found.append(Recipe(f"{name.as_posix()}/{pair}", *about, settings, published))
    return tuple(found)


def named(row: Mapping[str, Any], pair: str) -> dict[str, Any]:
    """A method's row with the pair's name in the place of `{pair}`."""
    return {key: value.replace("{pair}", pair) if isinstance(value, str) else value for key, value in row.items()}


def laid(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on `under`, section by section."""
    tree = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(tree.get(key), Mapping)
        tree[key] = laid(tree[key], value) if both else value
    return tree


def find(name: str) -> Recipe:
    known = recipes()
    if name not in known:
        close = "".join(f"; did you mean {other!r}?" for other in get_close_matches(name, known, 1, 0))
        raise UserError(f"there is no recipe {name!r}{close}  `python -m pupil recipe` lists all")
    return known[name]


def listing(prefix: str = "") -> Iterator[str]:
    """Every recipe with its published numbers, table by table."""
    title = ""
    for name, recipe in recipes().items():
        if not within(prefix, name):
            continue
        if title != (title := name.rpartition("/")[0]):
            yield f"{title}: {recipe.source}; {recipe.reports}"
        yield f"  {name}  {numbers(recipe)}"


def within(prefix: str, name: str) -> bool:
    return not prefix or name.startswith(prefix.rstrip("/") + "/")


def numbers(recipe: Recipe) -> str:
    """The published ones, and the methods that have none."""
    methods = [m for m in recipe.settings["methods"] if not any(key.split(",")[0] == m for key in recipe.published)]
    return " | ".join([*(f"{key} {shown(value)}" for key, value in recipe.published.items()), *methods])


def shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2f}"


def use(name: str | None, dry: bool = False, page: Path | None = None) -> None:
    """Rewrites params.yaml, or with `dry` says what it would rewrite; without a recipe's full name lists them."""
    if name is None or any(within(name, known) for known in recipes()):
        print("\n".join(listing(name or "")))
        return
    recipe, page = find(name), (page or ROOT / "params.yaml").resolve()
    text, changes = applied(recipe, page)
    if not dry and changes:
        replace(page, text)
    print(f"{name}: {recipe.source}")
    print("\n".join(f"  {line}" for line in changes) if changes else "  params.yaml says all of this already")
    print(f"published ({recipe.reports}): {numbers(recipe)}" if recipe.published else "published: nothing for this pair")
    for line in recipe.lacks:
        print(f"not as the authors: {line}")
    for line in kept(read_params(page), {change.split(":")[0] for change in changes}):
        print(f"kept: {line}")
    print(f"{'would change' if dry else 'changed'} {len(changes)} values of {page.name}", end="")
    print("" if dry else "; next: python -m pupil check, then make")


def kept(page: Mapping[str, Any], changed: set[str]) -> Iterator[str]:
    """Values of the user's own that may not fit what has changed."""
    for section, key, where in (("data", "path", "data.name"), ("teacher", "checkpoint", "teachers")):
        value = (page.get(section) or {}).get(key)
        if value is not None and where in changed:
            yield f"{section}.{key}: {value}, though {where} has changed"
    if (value := (page.get("student") or {}).get("checkpoint")) is not None and "students" in changed:
        yield f"student.checkpoint: {value}, though students has changed"


def applied(recipe: Recipe, page: Path) -> tuple[str, list[str]]:
    """The new text of params.yaml, every comment in place, and a line for each value that differs.

    A method's row is replaced as a whole, so that no value of an earlier recipe stays in it.
    """
    read_params(page)  # refuses in one line what is not there or not YAML
    return rewrite(page.read_text(), {**recipe.settings, "recipe": recipe.name}, whole="hp")


def told(name: str | None) -> dict[str, str]:
    """Family of networks, as in the comparison, -> its published number."""
    if name is None:
        return {}
    recipe = find(name)
    [teacher], [student] = recipe.settings["teachers"], recipe.settings["students"]
    families = {"teacher": teacher, "student": f"{student} alone"}
    return {families.get(key, f"{student} by {key} from {teacher}"): shown(value) for key, value in recipe.published.items()}


def replace(page: Path, text: str) -> None:
    """The new page in the place of the old one, if its settings are possible."""
    new = page.with_name(f".{page.name}.new")
    try:
        new.write_text(text)
        resolve(overlay(defaults(), read_params(new)))
        shutil.copymode(page, new)
        new.replace(page)
    finally:
        new.unlink(missing_ok=True)
