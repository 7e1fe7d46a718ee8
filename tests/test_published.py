"""Published checkpoints become model folders that answer as the authors' networks did; what is no checkpoint is refused.

Every architecture that models.json (of --golden) lists and our table has is filled by the golden weight rule, saved as
its repository saves, imported and compared with the golden logits.
"""

import contextlib
import dataclasses
import json
import os
import pickle
import re
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pupil import adopt as adopting
from pupil import assemble, checkpoint, config, models, published, session, tracking
from pupil import settings as settings_of
from pupil.adopt import adopt
from pupil.data import prepare
from pupil.models import NETWORKS, build
from pupil.types import UserError
from tests import tiny
from tests.reference.test_models import listings, ours, weight
from tests.test_mistakes import run, tree

pytestmark = pytest.mark.filterwarnings("ignore:.*pupil.__main__.*:RuntimeWarning")  # runpy runs it again, on purpose
GOLDEN = Path(__file__).parent / "golden"
State = dict[str, Tensor]
QUICK = 2_000_000  # parameters; what is larger is tested with the slow ones


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" not in metafunc.fixturenames:
        return
    folder = metafunc.config.getoption("--golden")
    listed = folder if (folder / "models.json").exists() else GOLDEN
    rows = [row for row in listings(listed / "models.json") if "repo" in row and row.get("golden_file")]
    known = [row for row in rows if ours(row["repo"], row["constructor"]) in NETWORKS]
    marks = [() if row["total_params"] <= QUICK else (pytest.mark.slow,) for row in known]
    metafunc.parametrize(
        "row",
        [pytest.param(row | {"folder": listed}, marks=m) for row, m in zip(known, marks, strict=True)],
        ids=[f"{row['repo']}-{row['constructor']}" for row in known],
    )


# --- how each repository saves --------------------------------------------------------------------------------------------


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def without_counters(state: State) -> State:
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


OPTIMIZER = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.05, "params": [0]}]}
Layout = Callable[[State, str], Any]
LAYOUTS: dict[str, tuple[str, Layout]] = {  # name of the case -> what is printed, what is saved
    "RepDistiller": (
        "RepDistiller",
        lambda s, n: {"epoch": 240, "model": s, "accuracy": torch.tensor(72.5), "optimizer": OPTIMIZER},
    ),
    "RepDistiller-best": (
        "RepDistiller or SimKD",
        lambda s, n: {"epoch": 3, "model": s, "best_acc": torch.tensor(7.0), "optimizer": OPTIMIZER},
    ),
    "RepDistiller-last": (
        "RepDistiller",
        lambda s, n: {"opt": Namespace(model=n, lr=0.05), "model": s, "optimizer": OPTIMIZER},
    ),
    "RepDistiller-student": ("RepDistiller", lambda s, n: {"opt": Namespace(model_s=n, model_t="resnet110"), "model": s}),
    "RepDistiller-0.4": ("RepDistiller", lambda s, n: {"model": without_counters(s), "accuracy": torch.tensor(7.0)}),
    "SimKD": ("RepDistiller or SimKD", lambda s, n: {"epoch": 240, "model": s, "best_acc": 72.5}),
    "SimKD-numpy": ("RepDistiller or SimKD", lambda s, n: {"epoch": 240, "model": s, "best_acc": np.float64(72.5)}),
    "HeadSharingKD": (
        "HeadSharingKD",
        lambda s, n: {
            "opt": Namespace(model_s=n),
            "model": prefixed(s, "model_s.") | {"t_head.weight": torch.zeros(100, 9), "t_head.bias": torch.zeros(100)},
        },
    ),
    "spot-adaptive-pytorch": (
        "spot-adaptive",
        lambda s, n: {"epoch": 3, "model": s, "policy": {"net.weight": torch.zeros(2)}, "acc": 0.7, "optimizer": OPTIMIZER},
    ),
    "ClassSpecialization-CSKD": (
        "CSKD",
        lambda s, n: {"epoch": 200, "state_dict": s, "err": np.float32(0.3), "acc": torch.tensor(0.7)},
    ),
    "REFILLED": ("REFILLED", lambda s, n: {"state_dict": s, "validating_accuracy": np.float64(0.7), "epoch": 200}),
    "mdistiller": (
        "mdistiller",
        lambda s, n: {
            "epoch": 240,
            "model": prefixed(s, "module.student.")
            | prefixed(s, "module.teacher.")
            | {"module.conv_reg.weight": torch.zeros(2)},
            "optimizer": OPTIMIZER,
            "best_acc": 72.5,
        },
    ),
    "mdistiller-student": ("mdistiller or RepDistiller", lambda s, n: {"model": s}),
    "torchvision": ("plain state dict", lambda s, n: OrderedDict(s)),
    "DataParallel": ("dict with state_dict", lambda s, n: {"arch": n, "state_dict": prefixed(s, "module.")}),
    "half": ("plain state dict", lambda s, n: {k: v.half() if v.is_floating_point() else v for k, v in s.items()}),
}


def published_state(constructor: str) -> State:
    """A network of models.json under its authors' keys, by the golden rule."""
    (row,) = [r for r in listings(GOLDEN / "models.json") if r["constructor"] == constructor and r["repo"] == "RepDistiller"]
    return {key: weight(key, tuple(shape)) for key, shape, _ in row["state_dict"]}


def as_published(network: str, state: State) -> State:
    """Our state dict under the keys of the authors of a network that models.json lists."""
    rename = models.published_key(network)
    return {key: state[rename(key)].clone() for key in published_state(network)}


def golden(row: dict[str, Any], images_of: int) -> tuple[Tensor, np.ndarray]:
    images = np.random.default_rng([1234, images_of]).standard_normal((2, 3, images_of, images_of)).astype(np.float32)
    with np.load(row["folder"] / row["golden_file"]) as z:
        return torch.from_numpy(images), z["logits"]


@torch.no_grad()
def agrees(folder: Path, row: dict[str, Any], tolerance: float = 1e-4) -> None:
    images, expected = golden(row, row["input_size"])
    net, _ = checkpoint.load(folder)
    assert np.abs(net(images).numpy() - expected).max() <= tolerance * np.abs(expected).max()


RESNET8 = {"folder": GOLDEN, "golden_file": "models-RepDistiller-resnet8.npz", "input_size": 32}


def convert(file: Path, arch: str | None = None, **kwargs: Any) -> Path:
    options = {"data": None, "classes": None, "teacher": None, "out": file.parent / "out"} | kwargs
    adopt(file, arch, **options)
    return options["out"]


# --- what is imported -----------------------------------------------------------------------------------------------------


def test_every_published_network_gives_the_golden_logits(row: dict[str, Any], tmp_path: Path) -> None:
    name = ours(row["repo"], row["constructor"])
    assert name is not None
    file = tmp_path / "ckpt.pth"
    state = {key: weight(key, tuple(shape)) for key, shape, _ in row["state_dict"]}
    repo = row["repo"] if row["repo"] in LAYOUTS else "RepDistiller"
    torch.save(LAYOUTS[repo][1](state, row["constructor"]), file)
    agrees(convert(file, name, data="cifar100"), row)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_every_layout_is_read(case: str, legacy: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed, layout = LAYOUTS[case]
    file = tmp_path / "model.pth.tar"
    state = published_state("resnet8")
    saved = layout(state, "resnet8")
    torch.save(saved, file, _use_new_zipfile_serialization=not legacy, pickle_protocol=2)
    folder = convert(file, "resnet8")
    agrees(folder, RESNET8, 1e-2 if case == "half" else 1e-4)
    out = capsys.readouterr().out
    read = len(without_counters(state)) if case.endswith("0.4") else len(state)
    assert f"layout {printed}; resnet8, all {read} tensors matched" in out
    assert f"use it: distill.checkpoint={folder}" in out
    told = " ".join(line for line in out.splitlines() if line.startswith("left out"))
    if "optimizer" in saved:
        assert "optimizer" in told
    if case == "HeadSharingKD":
        assert "2 tensors of t_head" in told
    if case == "mdistiller":
        assert f"{len(state)} tensors of teacher" in told
        assert "1 tensors of conv_reg" in told
    if case.endswith("0.4"):
        assert "9 counters num_batches_tracked are not in the file" in out
    meta = checkpoint.read_meta(folder)
    assert (meta["role"], meta["network"], meta["classes"]) == ("teacher", "resnet8", [str(k) for k in range(100)])
    assert meta["mean"] == [0.5071, 0.4867, 0.4408]
    assert meta["imported"] == {"layout": printed, "sha256": checkpoint.sha256(file)}


@pytest.mark.parametrize("case", ["RepDistiller-last", "RepDistiller-student", "HeadSharingKD", "DataParallel"])
def test_a_file_that_names_its_network_needs_no_arch(case: str, tmp_path: Path) -> None:
    torch.save(LAYOUTS[case][1](published_state("resnet8"), "resnet8"), tmp_path / "a.pth")
    agrees(convert(tmp_path / "a.pth"), RESNET8)


def test_a_safetensors_file_is_read_and_names_its_network(tmp_path: Path) -> None:
    save_file(published_state("resnet8"), tmp_path / "a.safetensors", metadata={"arch": "resnet8"})
    agrees(convert(tmp_path / "a.safetensors"), RESNET8)


def test_our_own_weights_without_their_description_are_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = build("resnet8", 10)
    torch.save(net.state_dict(), tmp_path / "a.pt")
    assert tiny.same(tiny.state(checkpoint.load(convert(tmp_path / "a.pt", "resnet8", data="cifar10"))[0]), tiny.state(net))


def test_the_names_of_repdistiller_are_those_of_our_table() -> None:
    assert published.in_table("vgg8_bn") == "vgg8"
    assert published.in_table("wrn-16-1") == "wrn_16_1"
    assert published.in_table("nothing") is None


@pytest.mark.parametrize("side", [16, 32], ids=["same side", "student's map pooled"])
@torch.no_grad()
def test_simkd_becomes_the_network_that_it_deploys(side: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher_name = "resnet14" if side == 16 else "vgg8"
    method = tiny.make("simkd", {}, teacher=teacher_name)
    assert (method.surgery["side"] is None) == (side == 16)
    deployed = method.student.eval()
    for i, (key, value) in enumerate(deployed.state_dict().items()):  # the batch norms: not as they are at the start
        if value.is_floating_point() and value.ndim == 1 and "head" not in key:
            value.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(i))
    facts = {"classes": ["a", "b", "c", "d"], "image_size": tiny.SIZE, "mean": [0.5] * 3, "std": [0.25] * 3, "role": "teacher"}
    teacher = {"network": teacher_name, "method": None, "surgery": {}, **facts}
    checkpoint.save(tmp_path / "teacher", method.teacher.state_dict(), teacher)

    plain = build(tiny.STUDENT, tiny.CLASSES).state_dict()
    trained = deployed.state_dict()
    student = as_published(tiny.STUDENT, plain | {k: v for k, v in trained.items() if k in plain and "head." not in k})
    first = 0 if method.surgery["side"] is None else 1
    neck = [key.split(".") for key in trained if key.startswith("neck.")]
    proj = {f"transfer.{int(i) - first}.{name}": trained[f"neck.{i}.{name}"] for _, i, name in neck}
    torch.save({"epoch": 1, "model": student, "proj": proj, "best_acc": 1.0}, tmp_path / "student.pth")

    folder = convert(tmp_path / "student.pth", tiny.STUDENT, teacher=str(tmp_path / "teacher"))
    images = tiny.first_batch().images
    net, meta = checkpoint.load(folder)
    assert torch.equal(net(images), deployed(images))
    assert (meta["method"], meta["classes"], meta["teacher"]["network"]) == ("simkd", facts["classes"], teacher_name)
    assert "encoder, projector and the classifier of" in capsys.readouterr().out

    folder = convert(tmp_path / "student.pth", tiny.STUDENT, data="cifar10", out=tmp_path / "plain")
    assert checkpoint.read_meta(folder)["method"] is None
    assert "left out: SimKD's projector" in capsys.readouterr().out

    for broken in ({}, proj | {"transfer.9.weight": torch.zeros(1)}, proj | {"transfer.6.weight": torch.zeros(2, 1, 1, 1)}):
        torch.save({"model": student, "proj": broken}, tmp_path / "broken.pth")
        with pytest.raises(UserError, match="projector"):
            convert(tmp_path / "broken.pth", tiny.STUDENT, teacher=str(tmp_path / "teacher"), out=tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


@torch.no_grad()
def test_headsharing_s_student_answers_with_both_classifiers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method = tiny.make("thkd", {"mix": 0.3})
    deployed = method.student.eval()
    own = {key: value for key, value in deployed.state_dict().items() if not key.startswith("teacher_head.")}
    head = {f"t_head.{key}": value for key, value in method.teacher.head.state_dict().items()}
    torch.save({"model": prefixed(as_published(tiny.STUDENT, own), "model_s.") | head}, tmp_path / "a.pth")
    names = tmp_path / "names.json"
    names.write_text('["a", "b", "c", "d"]')
    known = {"data": "cifar10", "classes": names}
    folder = convert(tmp_path / "a.pth", tiny.STUDENT, mix=0.3, **known)
    images = tiny.first_batch().images
    net, meta = checkpoint.load(folder)
    assert (meta["method"], meta["surgery"]) == ("thkd", {"mix": 0.3, "width": 64, "classes": 4})
    assert torch.equal(net(images), deployed(images))
    out = capsys.readouterr().out
    assert "with a share of 0.3" in out
    assert "left out" not in out

    plain = convert(tmp_path / "a.pth", tiny.STUDENT, out=tmp_path / "plain", **known)
    assert torch.equal(checkpoint.load(plain)[0](images), deployed.features(images).logits)  # type: ignore[operator]
    assert "2 tensors of t_head; with both classifiers: python -m pupil import with --mix" in capsys.readouterr().out


def test_mdistiller_s_bundled_teacher_is_a_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    teacher = build("resnet14", 100).state_dict()
    parts = prefixed(published_state("resnet8"), "module.student.")
    parts |= prefixed(as_published("resnet14", teacher), "module.teacher.")
    torch.save({"model": parts, "epoch": 240}, tmp_path / "a.pth")
    folder = convert(tmp_path / "a.pth", "resnet14", part="teacher", image_size=40)
    assert tiny.same(tiny.state(checkpoint.load(folder)[0]), teacher)
    assert checkpoint.read_meta(folder)["image_size"] == 40
    assert f"left out: the {len(published_state('resnet8'))} tensors of network" in capsys.readouterr().out


# --- it teaches -----------------------------------------------------------------------------------------------------------


def test_an_imported_network_teaches_when_the_user_says_whose_classes_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    optim = {"epochs": 1, "batch_size": 16, "lr": 0.02, "schedule": "cosine"}
    page: dict[str, Any] = {"device": "cpu", "optim": optim, "prepared": str(tmp_path / "data"), "methods": ["kd"]}
    page["data"] = {"train_images": 40, "val_images": 10, "test_images": 20, "image_size": 16, "pad": 2}
    page["distill"] = {"checkpoint": str(tmp_path / "named"), "student": "resnet8", "method": "kd", "seed": 0}
    settings = config.resolve(settings_of.overlay(settings_of.defaults(), page))
    settings = dataclasses.replace(settings, out=str(tmp_path / "run/model"), record=str(tmp_path / "run/record"))
    prepare(settings.data, tmp_path / "data")
    data = assemble.prepared(settings)
    torch.manual_seed(0)
    net = build("resnet14", 10)
    torch.save({"model": as_published("resnet14", net.state_dict()), "accuracy": 0.5}, tmp_path / "t.pth")

    convert(tmp_path / "t.pth", "resnet14", data=str(tmp_path / "data"), out=tmp_path / "named")
    job = assemble.distillation(settings, data)
    assert job.teacher is not None
    assert tiny.same(tiny.state(job.teacher), tiny.state(net))
    session.run([[job]], data, settings)
    student = checkpoint.read_meta(tmp_path / "run/model")
    assert student["teacher"]["network"] == "resnet14"
    assert student["teacher"]["sha256"] == checkpoint.read_meta(tmp_path / "named")["sha256"]

    names = tmp_path / "names.json"
    names.write_text(json.dumps([f"kind {k}" for k in range(10)]))
    convert(tmp_path / "t.pth", "resnet14", data="cifar10", classes=names, out=tmp_path / "others")
    distill = dataclasses.replace(settings.distill, checkpoint=str(tmp_path / "others"))
    with pytest.raises(UserError, match=r"10 classes \(kind 0.* import it again with --data"):
        assemble.distillation(dataclasses.replace(settings, distill=distill), data)


# --- what is refused ------------------------------------------------------------------------------------------------------

RAN = Path("ran")  # what a hostile file would make


class Runs:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {RAN}",)


class Opens:
    def __reduce__(self) -> Any:
        return open, (str(RAN), "w")


class Whole(torch.nn.Linear):
    """A network that was pickled as a whole."""


def saved(content: Callable[[], Any]) -> Callable[[Path], object]:
    return lambda path: torch.save(content(), path)


def spoiled(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        torch.save(published_state("resnet8"), path)
        path.write_bytes(change(path.read_bytes()))

    return make


def changed(**change: Tensor | None) -> Callable[[Path], object]:
    """resnet8 with tensors replaced or, by None, lost; `__` stands for a dot."""
    over = {key.replace("__", "."): value for key, value in change.items()}
    return saved(lambda: {k: v for k, v in (published_state("resnet8") | over).items() if v is not None})


def classes(n: int) -> Callable[[Path], object]:
    return changed(fc__weight=torch.zeros(n, 64), fc__bias=torch.zeros(n))


def compressed(path: Path) -> None:
    """A zip file that grows a thousand times."""
    torch.save({"a": torch.zeros(4)}, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/9", bytes(20_000_000))


class Mistake(NamedTuple):
    line: str
    said: str
    also: str = ""
    make: Callable[[Path], object] = changed()


A8 = "import a.pth --arch resnet8"
MISTAKES = [
    # files
    Mistake("import nowhere.pth", "cannot read nowhere.pth: No such file"),
    Mistake("import .", ". is a folder, expected a file", "distill.checkpoint=."),
    Mistake(A8, "a.pth is empty", make=lambda p: p.write_bytes(b"")),
    Mistake(A8, "a.pth is a web page", make=lambda p: p.write_text("\n<!DOCTYPE html><html>not found</html>")),
    Mistake(A8, "a pointer of Git LFS", make=lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid x")),
    Mistake(A8, "truncated, damaged or no checkpoint", make=lambda p: p.write_text("hello, world\n" * 9)),
    Mistake(A8, "truncated, damaged or no checkpoint", make=lambda p: p.write_bytes(b"PK\x03\x04" + bytes(99))),
    Mistake(A8, "truncated, damaged or no checkpoint", make=spoiled(lambda b: b[: len(b) // 2])),
    Mistake(A8, "truncated, damaged or no checkpoint", make=spoiled(lambda b: b[:100])),
    Mistake("import a.safetensors", "no safetensors file", make=lambda p: p.with_suffix(".safetensors").write_bytes(b"9" * 50)),
    Mistake(A8, "unpacks to more than its size", make=compressed),
    # pickles that are more than weights
    Mistake(A8, "system", "nothing of the file was run", saved(lambda: {"model": published_state("resnet8"), "x": Runs()})),
    Mistake(A8, "system", "a.pth names", lambda p: p.write_bytes(pickle.dumps(Runs(), 2))),
    Mistake(A8, "truncated, damaged or no checkpoint", make=lambda p: p.write_bytes(pickle.dumps(Runs(), 4))),
    Mistake(A8, "system", "a.pth names", lambda p: p.write_bytes(pickle.dumps(Runs(), 0))),
    Mistake(A8, "open", "a.pth names", saved(lambda: {"opt": Namespace(model=Opens()), "model": {}})),
    Mistake(A8, "tests.test_published.Whole", "state_dict() alone", saved(lambda: Whole(2, 2))),
    Mistake(A8, "pathlib.", "a.pth names", saved(lambda: {"opt": Namespace(where=Path("x")), "model": {}})),
    # what is inside
    Mistake(A8, "holds one list, expected a dict of tensors", make=saved(lambda: [torch.zeros(2)])),
    Mistake(A8, "holds no tensors", make=saved(dict)),
    Mistake(A8, "expected named tensors, got int at epoch", make=saved(lambda: {"epoch": 3})),
    Mistake(A8, "expected named tensors, got Tensor at 3", make=saved(lambda: {3: torch.zeros(2)})),
    Mistake(A8, "fc.bias is not a plain tensor", make=changed(fc__bias=torch.zeros(100).to_sparse())),
    Mistake(A8, "fc.weight is not a plain tensor", make=changed(fc__weight=torch.zeros(1).expand(10**9, 64))),
    Mistake(A8, "1 tensors hold nan or infinity", "head.bias", changed(fc__bias=torch.full((100,), torch.nan))),
    # the network
    Mistake("import a.pth", "does not say which network it holds", "its tensors fit --arch resnet8"),
    Mistake("import a.pth --arch resnet9", "there is no 'resnet9'; did you mean 'resnet"),
    Mistake("import a.pth --arch resnet14", "not those of resnet14", "they fit --arch resnet8"),
    Mistake("import a.pth --arch wrn_16_1", "not those of wrn_16_1", "they fit --arch resnet8"),
    Mistake(A8, "stages.0.blocks.0.bn1.weight is missing", "resnet8, 1 differences", changed(layer1__0__bn1__weight=None)),
    Mistake(A8, "extra.weight is left over", "resnet8, 1 differences", changed(extra__weight=torch.zeros(2))),
    Mistake(A8, "conv1.weight is (16, 1, 3, 3), expected (16, 3, 3, 3)", make=changed(conv1__weight=torch.zeros(16, 1, 3, 3))),
    Mistake(A8, "head.weight and fc.weight are the same tensor", make=changed(head__weight=torch.zeros(100, 64))),
    Mistake("import a.pth", "the nearest is resnet", make=changed(fc__bias=None)),
    Mistake(
        "import a.pth",
        "names 'alexnet', not known here; its tensors fit --arch resnet8",
        make=saved(lambda: {"arch": "alexnet", "state_dict": published_state("resnet8")}),
    ),
    Mistake(
        "import a.pth",
        "not those of resnet14",
        "they fit --arch resnet8",
        saved(lambda: {"opt": Namespace(model="resnet14"), "model": published_state("resnet8")}),
    ),
    # the data
    Mistake(f"{A8} --data nowhere", "--data: expected the folder of prepared data, or one of cifar10, "),
    Mistake(f"{A8} --data digits", "--data: expected the folder of prepared data", "got 'digits'"),
    Mistake(A8, "no data set of the table has the network's 7 classes", "give --data", classes(7)),
    Mistake(A8, "more than one data set has the network's 10 classes", "ones: cifar10, fashion_mnist", classes(10)),
    Mistake(f"{A8} --classes nowhere.json", "--classes nowhere.json: expected a JSON file"),
    Mistake(f"{A8} --classes names.json", "expected 100 different names, got 3, 2 different"),
    Mistake(f"{A8} --classes bad.json", "expected a JSON list of names"),
    Mistake(f"{A8} --teacher nowhere", "leave it out", "no projector"),
    Mistake(f"{A8} --out full", "full is not empty"),
    # parts
    Mistake(f"{A8} --part teacher", "a.pth holds no 'teacher'; it holds nothing beside its network"),
    Mistake(f"{A8} --mix 0.5", "--mix is for HeadSharingKD's students", "(it has no `t_head`): leave it out"),
    Mistake(f"{A8} --mix 2", "--mix: expected the share of the teacher's classifier, above 0 and at most 1, got 2.0"),
    Mistake(f"{A8} --image-size 4", "--image-size: expected 8 or more pixels, got 4"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: re.sub(r"[^\w=.,\[\]-]+", " ", m.line + " " + m.said)[:70])
def test_a_mistake_gets_one_clear_line_and_leaves_nothing(
    mistake: Mistake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for module in (adopting, assemble, session, config):
        monkeypatch.setattr(module, "HOME", tmp_path)
    mistake.make(Path("a.pth"))
    Path("full").mkdir()
    Path("full/precious").touch()
    Path("names.json").write_text('["a", "b", "a"]')
    Path("bad.json").write_text("[1, 2]")
    before = tree(tmp_path)
    status = run(mistake.line, monkeypatch)
    err = capfd.readouterr().err
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    assert mistake.said in err
    assert mistake.also in err
    assert status == 2
    assert tree(tmp_path) == before
    assert not RAN.exists()


def test_a_damaged_file_is_refused_or_read_but_never_breaks(tmp_path: Path) -> None:
    """Every 97th byte of the pickled part changed: a UserError, or the tensors."""
    for legacy in (False, True):
        file = tmp_path / "a.pth"
        torch.save({"opt": Namespace(model="resnet8"), "model": published_state("resnet8")}, file)
        if legacy:
            torch.save(torch.load(file, weights_only=False), file, _use_new_zipfile_serialization=False)
        raw = file.read_bytes()
        for at in range(0, 8000, 97):
            file.write_bytes(raw[:at] + bytes([raw[at] ^ 0x55]) + raw[at + 1 :])
            with contextlib.suppress(UserError):
                assert published.read(file).state


def test_every_published_key_belongs_to_one_tensor_of_every_network() -> None:
    """The shapes of every network are known without building it in memory, for any number of classes."""
    for name in NETWORKS:
        head = {key: shape for key, shape in published.shapes(name).items() if key.startswith("head.")}
        assert set(head) == {"head.weight", "head.bias"}, name
        assert [shape[0] for shape in head.values()] == [1, 1]
