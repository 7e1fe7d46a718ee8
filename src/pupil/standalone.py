"""`python -m pupil export`: a trained network as a folder that loads without this project.

    student.safetensors   the weights, with the keys of the network's own class
    model.json            architecture, classes, preprocessing, method, teacher's hash, metrics
    load.py               20 lines: load() gives the network, classify(file, net) the probability of each class
    network/              the source files of the architecture; torchvision's and timm's networks need none

A network of torchvision or timm that is deployed as it is has their keys and is made by their own constructors.
The folder is tried before it is handed over: another Python, which cannot import this package, must get the same answers.
"""

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from pupil import checkpoint
from pupil.arrays import save_arrays
from pupil.assemble import find
from pupil.data.resized import shorter
from pupil.extract import extract
from pupil.methods import METHODS
from pupil.models import NETWORKS, external
from pupil.models.taps import External, native_state
from pupil.net import Net
from pupil.places import empty_or_new
from pupil.record import sha256
from pupil.types import UserError

STUDENT, LOADER = "student.safetensors", "load.py"

LOAD = '''\
"""{title}: net = load(); classify(file, net); or python load.py FILE."""
import json, sys, torch
from pathlib import Path
from PIL import Image, ImageOps
from safetensors.torch import load_file
{imports}

FACTS = json.loads(Path(__file__).with_name("model.json").read_text())

def load():  # (B, 3, {size}, {size}) float32, normalised as below -> (B, {classes}) {answers}
    net = {build}
    net.load_state_dict(load_file(Path(__file__).with_name("student.safetensors")))
    return net.eval().requires_grad_(False)

def classify(file, net):
    image = ImageOps.exif_transpose(Image.open(file))
    assert image.mode[0] not in "IF", f"expected 8 bits per channel, got an image of mode {{image.mode}}"
{see}
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view({size}, {size}, 3).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(FACTS[key]).view(3, 1, 1) for key in ("mean", "std"))
    return dict(zip(FACTS["classes"], net(((pixels - mean) / std)[None]).softmax(1)[0].tolist()))

if __name__ == "__main__":
    print("\\n".join(sorted(f"{{share:7.2%}}  {{name}}" for name, share in classify(sys.argv[1], load()).items())[:-6:-1]))
'''

SEE = {  # as images were evaluated, by data.crop
    "pad": """\
    image = ImageOps.fit(image.convert("RGB"), ({size}, {size}), Image.Resampling.BILINEAR)  # the centre square""",
    "resized": """\
    image, least = image.convert("RGB"), min(image.size)
    w, h = (int({short} * side / least) for side in image.size)  # the shorter side is {short}, then the centre is cut out
    left, top = round((w - {size}) / 2), round((h - {size}) / 2)
    image = image.resize((w, h), Image.Resampling.BILINEAR).crop((left, top, left + {size}, top + {size}))""",
}

TRIAL = """\
import sys
sys.modules["pupil"] = None
sys.path[:0] = [sys.argv[1]]
import load
from safetensors.torch import load_file, save_file
save_file({"logits": load.load()(load_file(sys.argv[2])["images"])}, sys.argv[3])
"""


class Recipe(NamedTuple):
    """How the network is made, in Python."""

    imports: list[str]
    build: str  # an expression
    modules: dict[str, Path | None]  # to copy, as `extract` takes them
    library: str | None = None  # that must be installed


def export(folder: Path, out: Path) -> None:
    """Writes the folder `out`; says what it needs."""
    empty_or_new(out)
    folder = find(str(folder))
    with torch.random.fork_rng(devices=[]), TemporaryDirectory() as scratch:
        torch.manual_seed(0)  # of what the network holds and its answer does not need
        net, meta = checkpoint.load(folder)
        made = Path(scratch) / "made"
        made.mkdir()
        recipe = plan(net, meta)
        write(made, net, meta, recipe)
        prove(made, net, meta, Path(scratch))
        shutil.copytree(made, out, dirs_exist_ok=True)
    needs = ", ".join(("torch", "safetensors", "pillow", *([recipe.library] if recipe.library else [])))
    print(f"{out}: {title(meta)}; without this project it answered as here; it needs {needs}: python {out / LOADER} IMAGE")


def write(out: Path, net: Net, meta: dict[str, Any], recipe: Recipe) -> None:
    save_arrays(out / STUDENT, native_state(net))
    packages = ("torch", "safetensors", "pillow", *([recipe.library] if recipe.library else []))
    facts = {**meta, "exported_from": meta["sha256"], "sha256": sha256(out / STUDENT)}
    facts["made_with"] = {name: version(name).split("+")[0] for name in packages}
    (out / checkpoint.META).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
    imports, build = recipe.imports, recipe.build
    if recipe.modules:
        extract(out, recipe.modules)
        about = f'"""The architecture of {title(meta)}."""'
        lines = [about, "", *imports, "", "", "def build():", f"    return {build}", ""]
        (out / "network").mkdir(exist_ok=True)
        (out / "network" / "__init__.py").write_text("\n".join(lines))
        imports, build = ["from network import build"], "build()"
    answers = "log-probabilities" if "mix" in meta["surgery"] else "logits"
    text = LOAD.format(
        title=title(meta),
        imports="\n".join(imports),
        build=build,
        size=meta["image_size"],
        see=SEE[meta.get("crop", "pad")].format(size=meta["image_size"], short=shorter(meta["image_size"])),
        classes=len(meta["classes"]),
        answers=answers,
    )
    (out / LOADER).write_text(text)


def title(meta: dict[str, Any]) -> str:
    teacher = meta.get("teacher")
    return " ".join([meta["network"], *([f"by {meta['method']} from {teacher['network']}"] if teacher else [])])


def plan(net: Net, meta: dict[str, Any]) -> Recipe:
    """The plain network's recipe, and around it what the method deploys."""
    name, classes, size, surgery = meta["network"], len(meta["classes"]), meta["image_size"], meta["surgery"]
    plain = in_table(name, classes) if name in NETWORKS else elsewhere(name, classes, size, cut=bool(surgery))
    if not surgery:
        return plain
    method = METHODS[surgery.get("then", meta["method"])]
    given = "".join(f", {key}={value!r}" for key, value in surgery.items() if key != "then")
    return plain._replace(
        imports=[*plain.imports, imported(method.__module__, method.__name__)],
        build=f"{method.__name__}.deployed({plain.build}{given})",
        modules={**plain.modules, method.__module__: None},
    )


def in_table(name: str, classes: int) -> Recipe:
    function = NETWORKS[name]
    return Recipe([imported(function.__module__, name)], f"{name}({classes})", {function.__module__: None})


def elsewhere(name: str, classes: int, size: int, cut: bool) -> Recipe:
    """`cut`: at its taps, as the method's surgery wants it."""
    if ":" not in name:
        library, _, model = name.partition("/")
        if cut:
            module = external.build.__module__
            return Recipe([imported(module, "build as plain")], f"plain({name!r}, {classes}, {size})", {module: None}, library)
        options = "".join(f", {key}={value!r}" for key, value in external.options(name, size).items())
        maker = "torchvision.models.get_model" if library == "torchvision" else "timm.create_model"
        return Recipe([f"import {library}"], f"{maker}({model!r}, num_classes={classes}{options})", {}, library)
    where, _, function = name.rpartition(":")
    module, file = ("pupil.own", external.find_file(where)) if where.endswith(".py") else (where, None)
    recipe = Recipe([imported(module, function)], f"{function}({classes})", {module: file})
    if not cut or isinstance(external.own(name, classes), Net):
        return recipe
    taps = External.__module__
    return recipe._replace(
        imports=[*recipe.imports, imported(taps, "as_net")],
        build=f"as_net({name!r}, {recipe.build}, {classes}, {size})",
        modules={**recipe.modules, taps: None},
    )


def imported(module: str, name: str) -> str:
    return f"from {'network' + module.removeprefix('pupil') if module.startswith('pupil.') else module} import {name}"


def prove(made: Path, net: Net, meta: dict[str, Any], scratch: Path) -> None:
    """Another Python without this package gives the same answers."""
    size, (images, answer) = meta["image_size"], (scratch / "images", scratch / "answer")
    x = (torch.arange(2 * 3 * size * size) % 251 / 125 - 1).view(2, 3, size, size)
    save_arrays(images, {"images": x})
    command = [sys.executable, "-I", "-c", TRIAL, str(made), str(images), str(answer)]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.splitlines() or ["it ended without a word"])[-1]
        raise UserError(f"{meta['network']} does not load without this project: {said}")
    expected = net(x)
    if (load_file(answer)["logits"] - expected).abs().max() > 1e-4 * expected.abs().max():
        raise UserError(f"{meta['network']} answers differently without this project; nothing was exported")
    for cache in list(made.rglob("__pycache__")):
        shutil.rmtree(cache)
