"""Whatever a file or a command line holds: a right answer or one clear line, never a traceback."""

import io
import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pupil import checkpoint, config, published
from pupil import settings as settings_of
from pupil.arrays import save_arrays
from pupil.data import Data, load, prepare
from pupil.data.decode import decode_block
from pupil.data.encoded import opened
from pupil.data.tree import list_tree
from pupil.models import build
from pupil.rows import PREDICTIONS, predictions
from pupil.types import UserError
from tests.test_limits import PETS
from tests.test_sources import GREY, as_folder, as_tgz, as_zip
from tests.test_tar import LONG, pack

few = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
many = settings(few, max_examples=250)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
values = st.recursive(
    plain, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=6), v, max_size=3), max_leaves=8
)
KEYS = settings_of.all_keys(settings_of.defaults())


def answer(read: Callable[[], Any]) -> Any:
    """What `read` gives, or None where it says in one line that it cannot."""
    try:
        return read()
    except UserError as e:
        said = str(e)
    assert said.strip()
    assert "\n" not in said.strip()
    return None


def bent(draw: st.DataObject, raw: bytes) -> bytes:
    """Cut, with bits flipped, with a part repeated, lost or overwritten."""
    spoiled = bytearray(raw)
    for _ in range(draw.draw(st.integers(1, 3))):
        at = draw.draw(st.integers(0, len(spoiled)))
        match draw.draw(st.sampled_from(["cut", "flip", "flip", "lose", "repeat", "overwrite"])):
            case "cut":
                del spoiled[at:]
            case "flip" if at < len(spoiled):
                spoiled[at] ^= 1 << draw.draw(st.integers(0, 7))
            case "lose":
                del spoiled[at : at + draw.draw(st.integers(1, 64))]
            case "repeat":
                spoiled[at:at] = spoiled[at : at + 40]
            case "overwrite":
                junk = draw.draw(st.binary(min_size=1, max_size=16))
                spoiled[at : at + len(junk)] = junk
    return bytes(spoiled)


# --- settings -----------------------------------------------------------------------------------------------------------


def checked(tree: Any) -> settings_of.Settings:
    return config.resolve(settings_of.overlay(settings_of.defaults(), tree))


@many
@given(key=st.sampled_from(KEYS), value=values)
def test_any_value_of_any_key_is_taken_or_refused(key: str, value: Any) -> None:
    tree: Any = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    found = answer(lambda: checked(tree))
    if found is not None:
        again = {k: v for k, v in settings_of.plain(found).items() if k != "given"}
        assert answer(lambda: checked(again)) == found, "what is taken is taken again"


@many
@given(tree=st.dictionaries(st.sampled_from([k.split(".")[0] for k in KEYS]) | st.text(max_size=8), values, max_size=4))
def test_any_page_is_taken_or_refused(tree: dict[str, Any]) -> None:
    answer(lambda: checked(tree))


@few
@given(data=st.data())
def test_a_bent_params_yaml_is_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    page = (Path(config.__file__).resolve().parents[2] / "params.yaml").read_bytes()
    (tmp_path / "params.yaml").write_bytes(bent(data, page))
    answer(lambda: checked(config.read_params(tmp_path / "params.yaml")))


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("page", [LAUGHS, "a: &a [*a]\n", "a: &a {b: *a}\n", "[" * 50_000, "? " * 5_000], ids=lambda p: p[:9])
def test_a_page_that_unfolds_without_end_is_refused(page: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(page)
    with pytest.raises(UserError, match=r"params\.yaml"):
        config.read_params(tmp_path / "params.yaml")


def test_aliases_of_an_honest_page_are_read(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("optim: &o {epochs: 3}\nteacher: {optim: *o}\n")
    assert config.read_params(tmp_path / "params.yaml") == {"optim": {"epochs": 3}, "teacher": {"optim": {"epochs": 3}}}


@few
@given(raw=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_as_params_yaml_are_read_or_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(raw)
    answer(lambda: checked(config.read_params(tmp_path / "params.yaml")))


@many
@given(key=st.sampled_from(KEYS) | st.text(max_size=10), value=st.text(max_size=20), mark=st.sampled_from(["", "+", "~", "++"]))
def test_any_override_is_read_or_refused(key: str, value: str, mark: str) -> None:
    answer(lambda: config.check_overrides([f"{mark}{key}={value}"], settings_of.defaults()))


@many
@given(words=st.lists(st.text(max_size=20), max_size=3))
def test_any_text_of_overrides_is_taken_apart_or_refused(words: list[str]) -> None:
    answer(lambda: config.words(["--overrides", *words]))


@many
@given(tree=values, overrides=st.lists(st.text(max_size=16) | st.sampled_from(KEYS).map(lambda k: f"{k}=[1]"), max_size=2))
def test_any_resolved_configuration_is_read_or_refused(tree: Any, overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "box.json").write_text(json.dumps(tree))
    answer(lambda: config.from_json([str(tmp_path / "box.json"), *overrides]))


# --- images -------------------------------------------------------------------------------------------------------------


def picture(mode: str, kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 4), dtype=np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels).convert("RGBA").convert("RGB" if mode == "CMYK" else mode).convert(mode).save(written, kind)
    return written.getvalue()


MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "L", "RGBA", "P", "1", "LA"),
    **{"GIF": ("P",), "BMP": ("RGB", "1"), "TIFF": ("RGB", "CMYK"), "WEBP": ("RGB",)},
}
SAMPLES = [picture(mode, kind) for kind, modes in MODES.items() for mode in modes]


@pytest.mark.parametrize("resized", [False, True])
@many
@given(data=st.data())
def test_a_bent_image_is_decoded_or_named(data: st.DataObject, resized: bool) -> None:
    """And what is kept of it for later can be decoded later."""
    raw = bent(data, data.draw(st.sampled_from(SAMPLES)))
    target, sizes = np.zeros((1, 3, 16, 16), np.uint8), np.zeros((1, 2), np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        marks, failures, files = decode_block(lambda name: raw, ["x"], target, sizes, resized)
        assert len(marks) == 1
        if failures:
            assert failures[0].strip()
            assert not target.any(), "nothing of a damaged image is used"
        else:
            assert sizes.min() >= 1
            if resized:
                assert opened(files[0]).size == tuple(sizes[0])


@few
@given(raw=st.binary(max_size=200))
def test_random_bytes_are_no_image(raw: bytes) -> None:
    marks, failures, _ = decode_block(
        lambda name: raw, ["x"], np.zeros((1, 3, 8, 8), np.uint8), np.zeros((1, 2), np.int64), False
    )
    assert (marks, list(failures)) == ([b""], [0])


@few
@given(data=st.data())
def test_a_bent_archive_is_listed_and_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    pack = data.draw(st.sampled_from([as_zip, as_tgz]))
    path = pack(PETS, tmp_path / "in")
    path.write_bytes(bent(data, path.read_bytes()))

    def read() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepare(Data(name="folder", path=str(path), image_size=8, unreadable="drop"), tmp_path / "out")

    answer(read)
    answer(lambda: list_tree("data.path", str(path)))


@few
@given(data=st.data())
def test_a_bent_shard_is_listed_and_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    members = [(f"{i}.{kind}", raw, {}) for i in range(6) for kind, raw in (("jpg", GREY[i]), ("cls", str(i % 2).encode()))]
    form = data.draw(st.sampled_from(["gnu", "pax"]))
    path = pack(tmp_path / "in.tar", (LONG.removesuffix(".jpg"), b"", {}), *members, form=form)
    path.write_bytes(bent(data, path.read_bytes()))

    def read() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepare(Data(name="shards", path=str(path), image_size=8, unreadable="drop"), tmp_path / "out")

    answer(read)


# --- prepared data, checkpoints, predictions ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    for crop in ("pad", "resized"):
        data = Data(name="folder", path=str(as_folder(PETS, root / "pets")), image_size=8, crop=crop)
        prepare(data, root / crop)
    return root


def unsealed(path: Path) -> dict[str, Any]:
    """Without the checksum, as a stranger may leave it out."""
    return {key: value for key, value in json.loads(path.read_text()).items() if key != "checksum"}


def copied(folder: Path, to: Path) -> Path:
    to.mkdir(exist_ok=True)
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


@pytest.mark.parametrize("crop", ["pad", "resized"])
@few
@given(data=st.data())
def test_bent_prepared_data_are_refused_or_the_same(data: st.DataObject, crop: str, prepared: Path, tmp_path: Path) -> None:
    folder = copied(prepared / crop, tmp_path / "data")
    name = data.draw(st.sampled_from(["manifest.json", "train.safetensors", "val.safetensors", "test.safetensors"]))
    (folder / name).write_bytes(bent(data, (folder / name).read_bytes()))
    found, whole = answer(lambda: load(folder)), load(prepared / crop)
    if found is not None:
        assert found.manifest["digest"] == whole.manifest["digest"]
        for split, (images, labels) in whole.splits.items():
            assert torch.equal(found.splits[split][1], labels)
            assert all(torch.equal(found.splits[split][0][i], images[i]) for i in range(len(labels)))


@few
@given(
    key=st.sampled_from(["classes", "mean", "counts", "sha256", "config", "augment", "teacher_classes", "version"]),
    value=values,
)
def test_any_value_in_a_manifest_is_refused_or_the_same(key: str, value: Any, prepared: Path, tmp_path: Path) -> None:
    folder = copied(prepared / "pad", tmp_path / "data")
    manifest = unsealed(folder / "manifest.json")
    (folder / "manifest.json").write_text(json.dumps({**manifest, key: value}))
    found = answer(lambda: load(folder))
    assert found is None or found.manifest[key] == value


META = {
    "network": "resnet8",
    "method": None,
    "surgery": {},
    "classes": [*"abcd"],
    "image_size": 16,
    "mean": [0.5] * 3,
    "std": [0.2] * 3,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    checkpoint.save(folder, build("resnet8", 4).state_dict(), META)
    return folder


@few
@given(key=st.sampled_from([*META, "sha256", "format"]), value=values)
def test_any_value_in_a_description_is_refused_or_of_no_matter(key: str, value: Any, model: Path, tmp_path: Path) -> None:
    folder = copied(model, tmp_path / "model")
    meta = unsealed(folder / checkpoint.META)
    (folder / checkpoint.META).write_text(json.dumps({**meta, key: value}))
    found = answer(lambda: checkpoint.load(folder))
    assert found is None or found[0](torch.zeros(2, 3, 16, 16)).shape == (2, 4)


SURGERY = {
    **dict.fromkeys(("thkd", "crdth"), ("mix", "width", "classes")),
    **dict.fromkeys(("simkd",), ("c_in", "c_out", "factor", "side", "classes")),
    **dict.fromkeys(("refilled",), ("then", "c_in", "c_out", "factor", "side", "classes")),
    **dict.fromkeys(("kd", "sakd"), ("mix",)),
}
numbers = st.integers(-2, 70) | st.sampled_from([64, 4, 10**6, 10**9, 10**18, 0.5, "simkd", "refilled", None]) | plain


@few
@given(data=st.data(), method=st.sampled_from(sorted(SURGERY)))
def test_any_surgery_is_refused_or_fits(data: st.DataObject, method: str, model: Path, tmp_path: Path) -> None:
    folder = copied(model, tmp_path / "model")
    meta = unsealed(folder / checkpoint.META)
    surgery = {key: data.draw(numbers) for key in SURGERY[method] if data.draw(st.integers(0, 9))}
    (folder / checkpoint.META).write_text(json.dumps({**meta, "method": method, "surgery": surgery}))
    answer(lambda: checkpoint.load(folder))


@few
@given(data=st.data())
def test_a_bent_model_folder_is_refused_or_the_same(data: st.DataObject, model: Path, tmp_path: Path) -> None:
    folder = copied(model, tmp_path / "model")
    name = data.draw(st.sampled_from([checkpoint.META, checkpoint.WEIGHTS]))
    (folder / name).write_bytes(bent(data, (folder / name).read_bytes()))
    found, (whole, _) = answer(lambda: checkpoint.load(folder)), checkpoint.load(model)
    if found is not None:
        assert all(torch.equal(value, whole.state_dict()[key]) for key, value in found[0].state_dict().items())


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("foreign")
    content = {"epoch": 3, "model": build("resnet8", 4).state_dict(), "best_acc": np.float64(0.5)}
    torch.save(content, folder / "zip.pth")
    torch.save(content, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_arrays(folder / "a.safetensors", build("resnet8", 4).state_dict())
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@many
@given(data=st.data())
def test_a_bent_foreign_checkpoint_is_refused_or_read(data: st.DataObject, foreign: dict[str, bytes], tmp_path: Path) -> None:
    name = data.draw(st.sampled_from(sorted(foreign)))
    raw = foreign[name]
    head = data.draw(st.booleans())  # where all that decides is; in the middle there are numbers alone
    (tmp_path / name).write_bytes(bent(data, raw[:2500]) + raw[2500:] if head else bent(data, raw))
    found = answer(lambda: published.read(tmp_path / name))
    assert found is None or all(isinstance(value, torch.Tensor) for value in found.state.values())
    if found is not None:
        answer(lambda: published.choose(tmp_path / name, found, "resnet8"))


@few
@given(raw=st.binary(max_size=100), suffix=st.sampled_from([".pth", ".safetensors", ".tar", ".model"]))
def test_random_bytes_are_no_checkpoint(raw: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(raw)
    assert answer(lambda: published.read(path)) is None


@many
@given(head=values, rest=st.binary(max_size=40))
def test_any_header_of_safetensors_is_refused_or_right(head: Any, rest: bytes, tmp_path: Path) -> None:
    text = json.dumps(head).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + rest)
    answer(lambda: published.read(tmp_path / "a.safetensors"))


@few
@given(data=st.data())
def test_bent_predictions_are_refused_or_fit_together(data: st.DataObject, tmp_path: Path) -> None:
    save_arrays(
        tmp_path / PREDICTIONS, {"deployed": torch.randn(6, 4), "last": torch.randn(6, 4), "labels": torch.arange(6) % 4}
    )
    (tmp_path / PREDICTIONS).write_bytes(bent(data, (tmp_path / PREDICTIONS).read_bytes()))
    found = answer(lambda: predictions(tmp_path))
    assert found is None or found["deployed"].shape[0] == len(found["labels"])


def test_the_generator_bends() -> None:
    """The tests above would be empty if nothing were refused."""
    refused = []

    @settings(few, max_examples=50)
    @given(data=st.data())
    def look(data: st.DataObject) -> None:
        raw = b'{"a": [1, 2, 3], "b": {"c": null}}'
        try:
            json.loads(bent(data, raw))
        except ValueError:
            refused.append(raw)

    look()
    assert len(refused) > 20
