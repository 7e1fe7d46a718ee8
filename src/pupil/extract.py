"""The few source files that a network needs, copied into a folder that works without this project.

Imports are followed from file to file: those of this package, which is called `network` there, and those of the working
folder's packages, which keep their names.  What is installed (torch, torchvision, timm, ...) is left to be installed.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from pupil.types import UserError

SOURCE = Path(__file__).resolve().parents[1]  # the folder that holds this package
OURS, THEIRS = "pupil", "network"


def extract(out: Path, modules: Mapping[str, Path | None]) -> None:
    """Copies modules (dotted name -> its file; None: where Python finds it) and all that they import."""
    found, waiting = {}, list(modules.items())
    while waiting:
        name, given = waiting.pop()
        file = given or locate(name)
        if name in found or file is None:
            continue
        found[name] = file
        waiting += [(needed, None) for needed in imports(name, file)]
    for name, file in found.items():
        below = renamed_path(name)
        target = out / below / "__init__.py" if file.name == "__init__.py" else out / below.with_suffix(".py")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(renamed(file))
    for folder in {parent for name in found if ours(name) for parent in renamed_path(name).parents} - {Path()}:
        (out / folder / "__init__.py").touch()


def locate(name: str) -> Path | None:
    """The file of a module of this package or of the working folder; None: it is installed, or is no module."""
    base = (SOURCE if ours(name) else Path.cwd()).joinpath(*name.split("."))
    return next((file for file in (base.with_name(f"{base.name}.py"), base / "__init__.py") if file.is_file()), None)


def imports(name: str, file: Path) -> Iterator[str]:
    """What may be modules: everything named in its imports, and the packages it is in."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    if package and package != name and not ours(name):  # Python runs their __init__; ours are left empty
        yield from ascending(package)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from ascending(alias.name)
        elif isinstance(node, ast.ImportFrom):
            start = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            below = [f"{base}.{alias.name}" for alias in node.names]
            yield from (module for module in below if locate(module))
            if not ours(base):
                yield from ascending(base)
            elif not all(locate(module) for module in below):
                yield base


def ascending(name: str) -> Iterator[str]:
    parts = name.split(".")
    yield from (".".join(parts[:n]) for n in range(len(parts), 0, -1))


def ours(name: str) -> bool:
    return name.partition(".")[0] == OURS


def renamed_path(name: str) -> Path:
    top, *rest = name.split(".")
    return Path(THEIRS if top == OURS else top, *rest)


def renamed(file: Path) -> str:
    text = file.read_text()
    if any(isinstance(node, ast.Name) and node.id == OURS for node in ast.walk(ast.parse(text))):
        raise UserError(f"{file}: `import {OURS}.x` cannot be copied; write `from {OURS}.x import y`")
    return re.sub(rf"^(\s*(?:from|import)\s+){OURS}\b", rf"\g<1>{THEIRS}", text, flags=re.MULTILINE)
