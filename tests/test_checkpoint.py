"""A trained network on disk: what is read is what was written, or is refused."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pupil import checkpoint
from pupil.methods.alone import Alone
from pupil.models import build
from pupil.net import FrozenLinear, Net
from pupil.optim import Optim
from pupil.sealed import read_sealed, write_sealed
from pupil.types import UserError
from tests import tiny

FACTS = {
    "classes": [f"class {i}" for i in range(tiny.CLASSES)],
    "image_size": tiny.SIZE,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
}


def saved(folder: Path, name: str, overrides: dict[str, Any], seed: int = 0) -> Net:
    """One epoch of a method, saved; the deployed network."""
    method = tiny.make(name, overrides, seed=seed)
    torch.manual_seed(0)
    trained = tiny.train(method, method.teacher, epochs=1, optim=Optim(epochs=1, lr=0.01, milestones=()))
    meta = {"network": tiny.STUDENT, "method": name, "surgery": method.surgery, **FACTS}
    checkpoint.save(folder, trained.last, meta)
    return method.student.eval()


def saved_alone(folder: Path, net: Net | None = None) -> Net:
    torch.manual_seed(3)
    net = build("resnet8", tiny.CLASSES) if net is None else net
    checkpoint.save(folder, net.state_dict(), {"network": "resnet8", "method": None, "surgery": {}, **FACTS})
    return net.eval()


@pytest.mark.parametrize(("name", "overrides"), tiny.VARIANTS, ids=tiny.label)
def test_what_is_loaded_answers_bit_for_bit_like_what_was_trained(name: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    net = saved(tmp_path, name, overrides)
    loaded, meta = checkpoint.load(tmp_path)
    images = tiny.first_batch().images
    with torch.no_grad():
        assert torch.equal(loaded(images), net(images))
    assert tiny.same(tiny.state(loaded), tiny.state(net))
    assert meta.items() >= {"network": tiny.STUDENT, "method": name, "format": 1, **FACTS}.items()
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_network_under_a_borrowed_classifier_is_loaded(tmp_path: Path) -> None:
    net = build("resnet8", tiny.CLASSES)
    net.head = FrozenLinear.of(net.head)
    net = saved_alone(tmp_path, net)
    images = tiny.first_batch().images
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path)[0](images), net(images))


@pytest.mark.parametrize("name", ["kd", "crd", "simkd"])
def test_equal_trainings_leave_equal_files(name: str, tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        saved(tmp_path / folder, name, {}, seed)
    for file in (checkpoint.WEIGHTS, checkpoint.META):
        a, b, c = ((tmp_path / folder / file).read_bytes() for folder in "abc")
        assert a == b
        assert a != c


def test_nothing_is_pickled(tmp_path: Path) -> None:
    saved_alone(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    weights = tmp_path / checkpoint.WEIGHTS
    assert not zipfile.is_zipfile(weights)
    raw = weights.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header.keys() - {"__metadata__"} == build("resnet8", tiny.CLASSES).state_dict().keys()


def error(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_every_damage_of_the_weights_is_noticed(tmp_path: Path) -> None:
    saved_alone(tmp_path)
    path = tmp_path / checkpoint.WEIGHTS
    raw = path.read_bytes()
    for at in (0, 9, 700, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
        assert "is damaged" in error(tmp_path)
    for end in (0, 8, len(raw) - 1):
        path.write_bytes(raw[:end])
        assert "is damaged" in error(tmp_path)
    path.unlink()
    assert "is missing" in error(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", "{}", '{"network": "resnet8", "method": null}', "\x00"])
def test_a_description_that_describes_no_network_is_refused(content: str, tmp_path: Path) -> None:
    saved_alone(tmp_path)
    (tmp_path / checkpoint.META).write_text(content)
    assert "model.json is damaged" in error(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"network": "resnet9"}, "'resnet9'"),
        ({"method": "magic"}, "'magic'"),
        ({"network": "resnet14"}, "does not fit the resnet14"),
        ({"classes": ["a", "b"]}, "does not fit"),
        ({"network": ["resnet8"]}, 'is damaged: its network is ["resnet8"]'),
        ({"classes": 10}, "is damaged: its classes is 10"),
        ({"classes": ["x", 3]}, "its classes is"),
        ({"image_size": 10**9}, "its image_size is 1000000000"),
        ({"image_size": "32"}, "its image_size is"),
        ({"mean": [0.5]}, "its mean is [0.5]"),
        ({"std": [0.5, 0.5, 0]}, "its std is [0.5, 0.5, 0]"),
        ({"std": [0.5, 0.5, float("nan")]}, "its std is"),
        ({"surgery": None}, "its surgery is null"),
        ({"sha256": None}, "its sha256 is null"),
        ({"method": "simkd", "surgery": {"c_in": 64}}, "does not fit"),
    ],
)
def test_a_description_of_another_network_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    saved_alone(tmp_path)
    path = tmp_path / checkpoint.META
    write_sealed(path, {**read_sealed(path), **change})
    assert said in error(tmp_path)


def test_weights_of_another_network_are_refused_even_with_their_own_hash(tmp_path: Path) -> None:
    saved_alone(tmp_path)
    state = load_file(tmp_path / checkpoint.WEIGHTS)
    state["head.weight"] = state["head.weight"][:, :3].contiguous()
    save_file(state, tmp_path / checkpoint.WEIGHTS)
    path = tmp_path / checkpoint.META
    write_sealed(path, {**read_sealed(path), "sha256": checkpoint.sha256(tmp_path / checkpoint.WEIGHTS)})
    assert "does not fit the resnet8" in error(tmp_path)


def test_a_folder_without_a_network_says_what_to_do(tmp_path: Path) -> None:
    assert "train it first (dvc repro) or give its folder" in error(tmp_path)
    assert "no trained network" in error(tmp_path / "nowhere")


def test_what_is_saved_can_be_read_by_whoever_may_read_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "plain").touch()
    saved_alone(tmp_path / "model")
    modes = {p.stat().st_mode for p in (tmp_path / "model").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


def test_a_network_alone_is_trained_and_saved_like_any_other(tmp_path: Path) -> None:
    torch.manual_seed(0)
    method = Alone(build("resnet8", tiny.CLASSES))
    trained = tiny.train(method, None, epochs=1)
    checkpoint.save(tmp_path, trained.best_by_val, {"network": "resnet8", "method": None, "surgery": {}, **FACTS})
    loaded, _ = checkpoint.load(tmp_path)
    assert tiny.same(tiny.state(loaded), trained.best_by_val)
