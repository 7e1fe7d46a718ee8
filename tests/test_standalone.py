"""What is exported loads where this package cannot be imported, and answers as it does here."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pupil import checkpoint, models, standalone
from pupil.assemble import build_method
from pupil.data.decode import decode
from pupil.data.encoded import as_tensor
from pupil.data.resized import centred
from pupil.extract import extract
from pupil.methods import METHODS
from pupil.models import NETWORKS
from pupil.net import FrozenLinear, Net
from pupil.sealed import read_sealed
from pupil.types import UserError
from tests.test_checkpoint import FACTS as PLAIN_FACTS

pytestmark = [
    pytest.mark.filterwarnings("ignore:::timm.*"),
    pytest.mark.filterwarnings("ignore:::torch.(_dynamo|fx|_functorch|jit).*"),
]
ROOT = Path(__file__).resolve().parents[1]
K, SIZE = 4, 32
FACTS = {**PLAIN_FACTS, "image_size": SIZE}
HELPER = "from torch import nn\n\n\ndef conv(a, b):\n    return nn.Conv2d(a, b, 3, 2, 1)\n"
OWN = '''
import torch.nn.functional as F
from torch import nn
{helper}
from pupil.models.resnet import resnet8
from pupil.net import GlobalPool


class Tiny(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.a, self.b, self.pool, self.out = conv(3, 8), conv(8, 16), GlobalPool(), nn.Linear(16, num_classes)

    def forward(self, x):
        return self.out(self.pool(F.relu(self.b(F.relu(self.a(x)))))[1])


def tiny(num_classes):
    return Tiny(num_classes)


def ours(num_classes):
    """
    from pupil come the blocks
    """
    return resnet8(num_classes)
'''
# network, method (None: alone), hyperparameters, teacher
CASES: dict[str, tuple[str, str | None, dict[str, Any], str]] = {
    "kd": ("resnet8", "kd", {}, "wrn_16_1"),
    "simkd": ("wrn_16_1", "simkd", {}, "resnet8x4"),
    "thkd-mixed": ("resnet8", "thkd", {"mix": 0.3}, "wrn_16_1"),
    "torchvision": ("torchvision/mobilenet_v3_small", None, {}, ""),
    "torchvision-kd": ("torchvision/shufflenet_v2_x0_5", "kd", {}, "resnet8"),
    "torchvision-simkd": ("torchvision/shufflenet_v2_x0_5", "simkd", {}, "resnet8"),
    "timm-of-one-size": ("timm/test_vit", None, {}, ""),
    "timm": ("timm/mobilenetv3_small_050", "kd", {}, "resnet8"),
    "own-file": ("nets/mine.py:tiny", "kd", {}, "resnet8"),
    "own-file-simkd": ("nets/mine.py:tiny", "simkd", {}, "resnet8"),
    "own-net-simkd": ("nets/mine.py:ours", "simkd", {}, "wrn_16_1"),
    "own-package": ("ownpackage.nets:tiny", None, {}, ""),
}
STRANGER = """
import importlib, json, sys
from pathlib import Path

class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pupil":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Nowhere())
try:
    import pupil
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("pupil could be imported")
import torch
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
x = load_file("images.safetensors")["images"]
for folder in sys.argv[1:]:
    sys.path.insert(0, folder)
    load = importlib.import_module("load")
    net = load.load()
    save_file({"one": net(x[:1]), "five": net(x)}, Path(folder).name + ".safetensors")
    Path(folder).with_suffix(".json").write_text(json.dumps(load.classify("image.png", net)))
    sys.path.remove(folder)
    for name in [n for n in sys.modules if n.partition(".")[0] in ("load", "network", "ownpackage")]:
        del sys.modules[name]
assert not [name for name in sys.modules if name.partition(".")[0] == "pupil"]
"""


def student(name: str, method: str | None, hp: dict[str, Any], teacher: str) -> tuple[Net, dict[str, Any]]:
    """A deployed network whose batch norms have seen something, and its metadata."""
    torch.manual_seed(1)
    meta = {"network": name, "method": method, "surgery": {}, "teacher": None, **FACTS}
    if method is None:
        net = models.build(name, K, SIZE)
    else:
        lent = models.build(teacher, K, SIZE).eval().requires_grad_(False)
        built = build_method(
            method, models.build(name, K, SIZE), lent, SIZE, torch.arange(8) % K, METHODS[method].Config(**hp), 0
        )
        net = built.student
        meta |= {"surgery": built.surgery, "teacher": {"network": teacher, "role": "teacher", "sha256": "0" * 64}}
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(torch.randn(16, 3, SIZE, SIZE))
    return net.eval(), meta


@pytest.fixture(autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a file and a package of one's own."""
    home = tmp_path_factory.getbasetemp() / "home"
    if not home.exists():
        for path, helper in (("nets/mine.py", HELPER), ("ownpackage/nets.py", "from .blocks.conv import conv")):
            (home / path).parent.mkdir(parents=True)
            (home / path).write_text(OWN.format(helper=helper))
        (home / "ownpackage/blocks").mkdir()
        (home / "ownpackage/blocks/conv.py").write_text(HELPER)
        (home / "ownpackage/__init__.py").write_text("KNOWN = 1\n")
    for name in [n for n in sys.modules if n.partition(".")[0] == "ownpackage"]:  # another test's
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.chdir(home)
    return home


def save(folder: Path, net: Net, meta: dict[str, Any]) -> None:
    checkpoint.save(folder, net.state_dict(), meta)


@pytest.mark.slow
def test_every_kind_of_network_answers_without_this_package_as_it_does_here(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, SIZE, SIZE, generator=g)
    save_file({"images": x}, tmp_path / "images.safetensors")
    pixels = torch.randint(0, 256, (45, 60, 3), generator=g, dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "image.png")
    ours: dict[str, Net] = {}
    for name, case in CASES.items():
        ours[name], meta = student(*case)
        save(tmp_path / "models" / name, ours[name], meta)
        standalone.export(tmp_path / "models" / name, tmp_path / "made" / name)
        (tmp_path / "moved").mkdir(exist_ok=True)
        (tmp_path / "made" / name).rename(tmp_path / "moved" / name)
    folders = [str(tmp_path / "moved" / name) for name in CASES]
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, *folders], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    png = (tmp_path / "image.png").read_bytes()
    pixels = torch.from_numpy(np.ascontiguousarray(decode(png, SIZE).pixels)) / 255
    image = ((pixels - 0.5) / 0.25)[None]
    for name, net in ours.items():
        answers = load_file(tmp_path / f"{name}.safetensors")
        with torch.no_grad():
            assert torch.equal(answers["one"], net(x[:1])), name
            assert torch.equal(answers["five"], net(x)), name
            shares = net(image).softmax(1)[0]
        assert answers["five"].std(0).min() > 1e-3, f"{name}: the answers depend on the images"
        said = json.loads((tmp_path / "moved" / name).with_suffix(".json").read_text())
        assert torch.allclose(torch.tensor([said[c] for c in FACTS["classes"]]), shares, atol=1e-6), name


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder."""
    save(tmp_path / "model", *student("torchvision/resnet18", "kd", {}, "resnet8"))
    return tmp_path / "model"


@pytest.fixture
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the other Python, which takes seconds and has a test of its own."""
    monkeypatch.setattr(standalone, "prove", lambda *args: None)


@pytest.mark.usefixtures("unproved")
@pytest.mark.parametrize("size", [(60, 45), (45, 60), (300, 301)])
def test_images_of_a_network_of_resized_crops_are_seen_as_they_were_evaluated(tmp_path: Path, size: tuple[int, int]) -> None:
    net, meta = student("torchvision/resnet18", "kd", {}, "resnet8")
    manifest = {**FACTS, "augment": {"crop": "resized"}}
    save(tmp_path / "model", net, meta | checkpoint.seen(manifest))
    standalone.export(tmp_path / "model", tmp_path / "out")
    assert "shorter side" in json.loads((tmp_path / "out" / "model.json").read_text())["preprocessing"]["resize"]
    spec = importlib.util.spec_from_file_location("its_load", tmp_path / "out" / "load.py")
    assert spec is not None
    assert spec.loader is not None
    load = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(load)
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image, seen = Image.fromarray(noise.numpy()), []
    image.save(tmp_path / "image.png")
    load.classify(tmp_path / "image.png", lambda x: seen.append(x) or torch.zeros(1, K))
    wanted = (as_tensor(centred(image, SIZE)) / 255 - torch.tensor(FACTS["mean"]).view(3, 1, 1)) / torch.tensor(
        FACTS["std"]
    ).view(3, 1, 1)
    assert torch.equal(seen[0][0], wanted)


@pytest.mark.usefixtures("unproved")
def test_a_network_of_a_library_is_loaded_by_the_library_alone(model: Path, tmp_path: Path) -> None:
    import torchvision

    standalone.export(model, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["load.py", "model.json", "student.safetensors"]
    net = torchvision.models.resnet18(num_classes=K)
    net.load_state_dict(load_file(tmp_path / "out/student.safetensors"))
    x = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.allclose(net.eval()(x), checkpoint.load(model)[0](x), rtol=0, atol=1e-6)
    assert "torchvision.models.get_model('resnet18', num_classes=4)" in (tmp_path / "out/load.py").read_text()


@pytest.mark.usefixtures("unproved")
@pytest.mark.parametrize("case", ["simkd", "torchvision-simkd", "own-file"])
def test_the_loader_has_twenty_lines_and_only_what_is_needed_lies_beside_it(case: str, tmp_path: Path) -> None:
    save(tmp_path / "model", *student(*CASES[case]))
    standalone.export(tmp_path / "model", tmp_path / "out")
    lines = (tmp_path / "out/load.py").read_text().splitlines()
    assert len([line for line in lines if line]) == 20
    assert max(map(len, lines)) <= 128
    files = {str(p.relative_to(tmp_path / "out/network")) for p in (tmp_path / "out/network").rglob("*.py")}
    needed = {"__init__.py", "models/__init__.py", "net.py", "types.py"}
    more = {
        "simkd": {"methods/__init__.py", "methods/base.py", "methods/simkd.py", "models/wrn.py"},
        "torchvision-simkd": {"methods/simkd.py", "models/external.py", "models/taps.py", "models/tracing.py"},
        "own-file": {"own.py", "models/resnet.py"},
    }
    assert needed | more[case] <= files
    assert len(files) <= 13, files
    for file in (tmp_path / "out").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) pupil\b(?! come)", file.read_text(), re.MULTILINE), file


@pytest.mark.usefixtures("unproved")
def test_the_description_says_what_a_stranger_needs(model: Path, tmp_path: Path) -> None:
    standalone.export(model, tmp_path / "out")
    before, after = (json.loads((f / "model.json").read_text()) for f in (model, tmp_path / "out"))
    assert after["sha256"] == checkpoint.sha256(tmp_path / "out/student.safetensors")
    assert after["exported_from"] == before["sha256"] == checkpoint.sha256(model / "model.safetensors")
    assert after["made_with"].keys() == {"torch", "safetensors", "pillow", "torchvision"}
    assert after["preprocessing"].keys() == {"resize", "values", "input"}
    assert after["teacher"]["sha256"] == "0" * 64
    assert before.keys() - {"checksum"} <= after.keys()


@pytest.mark.usefixtures("unproved")
def test_equal_networks_make_equal_folders(model: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    for name in ("a", "b"):
        standalone.export(model, tmp_path / name)
        assert torch.equal(torch.get_rng_state(), state)
        state = torch.get_rng_state()
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_a_borrowed_classifier_is_an_ordinary_one_outside(tmp_path: Path) -> None:
    net, meta = student("resnet8", None, {}, "")
    net.head = FrozenLinear.of(net.head)
    save(tmp_path / "model", net, meta)
    standalone.export(tmp_path / "model", tmp_path / "out")  # which compares the answers


def test_every_network_of_the_table_can_be_copied(tmp_path: Path) -> None:
    """The families' files import nothing but torch and what is copied with them."""
    modules = {build.__module__ for build in NETWORKS.values()}
    extract(tmp_path, dict.fromkeys(modules))
    lines = [standalone.imported(build.__module__, name) for name, build in NETWORKS.items()]
    lines += [f"assert isinstance({name}(3), nn.Module)" for name in NETWORKS]
    code = "\n".join(["import sys; sys.modules['pupil'] = None; sys.path.insert(0, '.')", "import torch; from torch import nn"])
    code += "\ntorch.set_default_device('meta')\n" + "\n".join(lines)
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "network/models/external.py").exists()


# --- refusals: one line each ----------------------------------------------------------------------------------------------


def refused(folder: Path, out: Path) -> str:
    with pytest.raises(UserError) as e:
        standalone.export(folder, out)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_what_cannot_be_exported_is_refused_in_one_line_and_nothing_is_left(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "no trained network in" in refused(tmp_path, out)
    assert "is not empty; nothing is overwritten" in refused(model, model)
    assert "is not empty" in refused(model, model / "model.json")
    meta = read_sealed(model / "model.json")
    (model / "model.json").write_text(json.dumps({**meta, "network": "resnet9"}))
    assert "'resnet9', method 'kd': not known here" in refused(model, out)
    (model / "model.json").write_text(json.dumps({**meta, "network": "torchvision/resnet19"}))
    assert "there is no 'torchvision/resnet19'" in refused(model, out)
    (model / "model.json").write_text(json.dumps(meta))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "is damaged: its SHA-256" in refused(model, out)
    assert not out.exists()


DEPENDENT = """
import {0}
from torch import nn

def net(k):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, k))
"""


@pytest.mark.parametrize(
    ("imported", "said"),
    [
        ("hidden_away", "does not load without this project: ModuleNotFoundError: No module named 'hidden_away'"),
        ("pupil.net\nNet = pupil.net.Net", "`import pupil.x` cannot be copied; write `from pupil.x import y`"),
    ],
)
def test_a_network_that_needs_more_than_can_be_copied_is_refused(
    imported: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path/hidden_away.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "path")
    (tmp_path / "mine.py").write_text(DEPENDENT.format(imported))
    save(tmp_path / "model", *student(f"{tmp_path}/mine.py:net", None, {}, ""))
    assert said in refused(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_answers_are_noticed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native = standalone.native_state

    def wrong(net: Net) -> dict[str, Tensor]:
        return {key: value + 1 if key == "fc.bias" else value for key, value in native(net).items()}

    monkeypatch.setattr(standalone, "native_state", wrong)
    assert "answers differently without this project" in refused(model, tmp_path / "out")


def test_the_command_says_what_it_does_and_a_mistake_is_one_line(tmp_path: Path) -> None:
    def command(*args: str) -> "subprocess.CompletedProcess[str]":
        code = [sys.executable, "-m", "pupil", "export", *args]
        return subprocess.run(code, cwd=ROOT / "src", capture_output=True, text=True, timeout=120)

    shown = command("--help")
    assert shown.returncode == 0
    assert "student.safetensors" in shown.stdout
    done = command(str(tmp_path), str(tmp_path / "out"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: no trained network in {tmp_path}")
