"""Networks from elsewhere: `torchvision/NAME`, `timm/NAME`, and functions of one's own.

One's own: `package.module:function` or `path/to/file.py:function`; the function takes the number of classes and returns
an nn.Module that gives logits, or a `Net`.  Nothing is imported before it is asked for: both libraries are optional.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from pupil.models.taps import answers_classes, as_net
from pupil.models.tracing import one_line
from pupil.net import Net
from pupil.types import UserError

LIBRARIES = ("torchvision", "timm")
HOME = Path(os.environ.get("DVC_ROOT", Path(__file__).resolve().parents[3]))  # the checkout
WATCHED = "networks"  # the folder that the stages of dvc.yaml depend on
OURS = ("out", "runs")  # where our own trainings leave model folders
ASKED: set[str] = set()  # names of code that the settings, or whoever called, have given in this process


def is_external(name: str) -> bool:
    """Whether a name is of this kind; whether there is such a network is for `check` to say."""
    return ":" in name or name.partition("/")[0] in LIBRARIES


def check(name: str) -> None:
    """Refuses, in one line, a name that nothing answers to; builds nothing."""
    if ":" in name:
        ASKED.add(name)
        factory(name)
        return
    library, _, model = name.partition("/")
    names = models_of(library)
    if model not in names:
        close = get_close_matches(model, names, 1, 0.5)
        hint = f"did you mean '{library}/{close[0]}'?" if close else f"{library}.list_models() in Python names all {len(names)}"
        if library == "torchvision" and not close:
            hint = "torchvision.models.list_models() in Python names them"
        raise UserError(f"there is no {name!r}; {hint}")


def build(name: str, num_classes: int, image_size: int) -> Net:
    check(name)
    if ":" in name:
        network = own(name, num_classes)
    elif name.startswith("timm/"):
        network = from_timm(name.partition("/")[2], num_classes, image_size)
    else:
        network = from_torchvision(name.partition("/")[2], num_classes, image_size)
    if isinstance(network, Net):  # one's own, by hand
        answers_classes(name, network, num_classes, image_size)
        return network
    return as_net(name, network, num_classes, image_size)


def models_of(library: str) -> list[str]:
    if library == "torchvision":
        models: Any = library_module("torchvision").models
        return models.list_models(module=models)  # the classifiers
    return library_module("timm").list_models()


def library_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name != name:
            raise
        raise UserError(f"networks named {name}/... need {name}, which is not installed: pip install {name}") from None


def from_torchvision(model: str, num_classes: int, image_size: int) -> nn.Module:
    given = options(f"torchvision/{model}", image_size)
    try:
        return library_module("torchvision").models.get_model(model, weights=None, num_classes=num_classes, **given)
    except Exception as e:  # what it has against this size
        raise UserError(f"torchvision/{model} cannot be built for images of {image_size} pixels: {one_line(e)}") from None


def from_timm(model: str, num_classes: int, image_size: int) -> nn.Module:
    given = options(f"timm/{model}", image_size)
    try:
        return library_module("timm").create_model(model, num_classes=num_classes, **given)
    except Exception as e:  # what it has against this size
        raise UserError(f"timm/{model} cannot be built for images of {image_size} pixels: {one_line(e)}") from None


def options(name: str, image_size: int) -> dict[str, Any]:
    """What a library's constructor is given beside the number of classes."""
    library, _, model = name.partition("/")
    if library == "timm":
        cfg = library_module("timm").get_pretrained_cfg(model)
        return {"img_size": image_size} if cfg is not None and cfg.fixed_input_size else {}
    if model in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    return {"image_size": image_size} if model.startswith("vit_") else {}


def own(name: str, num_classes: int) -> nn.Module:
    try:
        network = factory(name)(num_classes)
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{name} cannot be called with the number of classes, {num_classes}: {one_line(e)}") from None
    if not isinstance(network, nn.Module):
        raise UserError(f"{name} must return an nn.Module, got {type(network).__name__}")
    return network


def factory(name: str) -> Callable[[int], Any]:
    """The function that is meant."""
    where, _, function = name.rpartition(":")
    try:
        module = from_file(where) if where.endswith(".py") else from_package(where)
    except UserError:
        raise
    except Exception as e:  # whatever the user's file does
        raise UserError(f"{name}: {where} cannot be imported: {one_line(e)}") from None
    found = getattr(module, function, None)
    if not callable(found):
        functions = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        close = get_close_matches(function, functions, 1, 0.5)
        raise UserError(f"{where} has no function {function!r}{f'; did you mean {close[0]!r}?' if close else ''}")
    return found


def refuse_code(name: str, folder: Path) -> None:
    """A model folder may be a stranger's: what its model.json names is not run unless the user did something for it."""
    if ":" not in name or name in ASKED or any(folder.resolve().is_relative_to((HOME / ours).resolve()) for ours in OURS):
        return
    where = name.rpartition(":")[0]
    watched = where.endswith(".py") and (HOME / WATCHED).resolve() in find_file(where).resolve().parents
    if not watched:
        raise UserError(
            f"{folder} names code, {name!r}, which nothing here has asked for; it was not run. If you trust it, move its"
            f" file to {WATCHED}/, or name it in params.yaml (teachers, students)"
        )


def unwatched(name: str) -> str | None:
    """What to say of one's own file that DVC does not watch; None where there is nothing to say."""
    where = name.rpartition(":")[0]
    if not where.endswith(".py"):
        return None
    seen = (HOME / WATCHED).resolve() in find_file(where).resolve().parents
    return None if seen else f"dvc does not see changes of {where}: move it to {WATCHED}/"


def find_file(path: str) -> Path:
    """A path from the working folder, else from the checkout."""
    file = next((f for f in (Path(path), HOME / path) if f.is_file()), None)
    if file is None:
        raise UserError(f"there is no file {path!r}; write path/to/file.py:function or package.module:function")
    return file


def from_file(path: str) -> ModuleType:
    file = find_file(path)
    spec = importlib.util.spec_from_file_location(f"pupil_own_{file.stem}", file.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def from_package(name: str) -> ModuleType:
    """The working folder's packages are found, whatever started Python."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(here)
