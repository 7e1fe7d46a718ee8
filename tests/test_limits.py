"""Folders, archives, checkpoints and descriptions from strangers: nothing leads out of them, nothing bursts out of them."""

import bz2
import gzip
import io
import json
import os
import struct
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pupil import checkpoint, jsonfile, published
from pupil.data import Data, limits, load, prepare
from pupil.data.files import MOST, open_split
from pupil.data.tree import list_tree, opener
from pupil.models import external
from pupil.types import UserError
from tests.test_sources import GREY, as_folder, as_zip, cub200

PETS = {f"{name}/{i}.jpg": GREY[40 * i] for name in ("cat", "dog") for i in range(5)}
SECRET = b"\x89PNG secret"


def error(path: Path, name: str = "folder") -> str:
    with pytest.raises(UserError) as caught:
        prepare(Data(name=name, path=str(path), image_size=8), path.parent / "out")
    assert "\n" not in str(caught.value)
    assert not (path.parent / "out").exists()
    return str(caught.value)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return as_folder(PETS, tmp_path / "pets")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Somebody's own folder, beside the stranger's."""
    return as_folder({"cat/secret.png": SECRET, "eel/secret.jpg": GREY[0]}, tmp_path / "outside")


# --- folders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["cat/6.png", "eel", "cat/deep", "cat/dangling.png"])
def test_a_link_out_of_the_folder_is_refused(inside: str, pets: Path, outside: Path) -> None:
    target = {".png": outside / "cat/secret.png", "": outside / "eel"}[Path(inside).suffix]
    (pets / inside).symlink_to(outside / "gone.png" if "dangling" in inside else target)
    text = error(pets)
    assert f"{inside} is a link to {outside}" in text
    assert "nothing was read: give a copy without links (cp -rL)" in text


def test_links_that_stay_inside_and_the_folder_s_own_are_followed(pets: Path, tmp_path: Path) -> None:
    (pets / "cat/again.jpg").symlink_to("../dog/3.jpg")
    (pets / "eel").symlink_to("dog")
    (tmp_path / "way").symlink_to(pets)
    manifest = prepare(Data(name="folder", path=str(tmp_path / "way"), image_size=8), tmp_path / "out")
    assert manifest["classes"] == ["cat", "dog", "eel"]
    assert sum(manifest["counts"].values()) == 16


@pytest.mark.parametrize("link", ["cat/up", "cat/here"])
def test_a_link_to_a_folder_above_is_refused_and_not_followed_for_ever(link: str, pets: Path) -> None:
    (pets / link).symlink_to({"cat/up": "..", "cat/here": "."}[link])
    assert f"{link} is a link to a folder that it is in; remove the link" in error(pets)


def test_a_link_out_that_nobody_reads_is_no_matter(pets: Path, outside: Path, tmp_path: Path) -> None:
    (pets / "cat/LICENSE").symlink_to(outside / "cat/secret.png")
    (pets / ".git").symlink_to(outside)
    assert prepare(Data(name="folder", path=str(pets), image_size=8), tmp_path / "out")["classes"] == ["cat", "dog"]


def test_a_pipe_in_the_place_of_an_image_does_not_wait_for_a_writer(pets: Path) -> None:
    os.mkfifo(pets / "cat/6.png")
    assert "cat/6.png is no file but a pipe or a device" in error(pets)


def test_a_list_that_names_files_elsewhere_reads_none_of_them(tmp_path: Path) -> None:
    """images.txt of CUB-200 names each image: a stranger's may name others."""
    files = cub200()
    first = next(name for name in files if name.startswith("images/"))
    for elsewhere in ("../../outside/secret.jpg", str(tmp_path / "outside/secret.jpg")):
        as_folder({"secret.jpg": GREY[7]}, tmp_path / "outside")
        lists = files["images.txt"].replace(first.removeprefix("images/").encode(), elsewhere.encode())
        for pack in (as_folder, as_zip):
            text = error(pack(files | {"images.txt": lists}, tmp_path / "in"), "cub200")
            assert "cannot read image" in text or "name different" in text or "classes" in text
            assert "secret.jpg (not there)" in text


def test_a_file_that_is_too_large_is_named_and_not_read(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(pets / "cat/6.png", "wb") as file:
        file.truncate(10 << 30)  # 10 GB of nothing: a sparse file
    tracemalloc.start()
    assert "cannot read image cat/6.png (6.png has 10737418240 bytes, more than 536870912)" in error(pets)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()
    monkeypatch.setattr(limits, "MOST_FILES", 5)
    assert "more than 5 files" in error(pets)


def test_a_folder_that_may_not_be_listed_is_not_left_out_silently(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(limits.os, "scandir", refuse)
    assert f"cannot list {pets}: Permission denied" in error(pets)


# --- pixels ---------------------------------------------------------------------------------------------------------------


def wide_png(width: int, height: int) -> bytes:
    """A small file that says it has so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(10_000, 10_000), (60_000, 60_000), (2_000_000_000, 1)])
def test_an_image_of_too_many_pixels_is_one_line_that_names_it(size: tuple[int, int], pets: Path) -> None:
    assert size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or 0) > 0
    (pets / "cat/huge.png").write_bytes(wide_png(*size))
    text = error(pets)
    assert text.startswith("cannot read image cat/huge.png (Image size ")
    assert "exceeds limit" in text


# --- archives -------------------------------------------------------------------------------------------------------------


def tar_of(path: Path, *members: tuple[str, bytes, dict[str, object]]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, raw, facts in members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            for key, value in facts.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(raw))
    return path


PLAIN = [(name, raw, {}) for name, raw in PETS.items()]


@pytest.mark.parametrize("name", ["../out.png", "cat/../../out.png", "/etc/cat/x.png", "..\\cat\\x.png", "\\\\host\\x.png"])
def test_a_name_that_leads_out_of_an_archive_is_refused(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for inside, raw in [*PETS.items(), (name, GREY[0])]:
            archive.writestr(zipfile.ZipInfo(inside), raw)
    tar = tar_of(tmp_path / "a.tgz", *PLAIN, (name, GREY[0], {}))
    for path in (tmp_path / "a.zip", tar):
        assert f"the name {name!r} leads out of it" in error(path)


def test_links_and_devices_in_an_archive_are_not_followed(tmp_path: Path, outside: Path) -> None:
    secret = outside / "eel/secret.jpg"
    link, hard, device = (
        {"type": kind, "linkname": str(secret)} for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE)
    )
    members = [(f"cat/x{i}.jpg", b"", facts) for i, facts in enumerate((link, hard, device))]
    tree = list_tree("data.path", str(tar_of(tmp_path / "a.tgz", *PLAIN, *members)))
    assert set(tree.files) == set(PETS)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, raw in PETS.items():
            archive.writestr(name, raw)
        info = zipfile.ZipInfo("cat/x.jpg")
        info.external_attr = 0o120777 << 16  # a symbolic link: its content is where it leads
        archive.writestr(info, str(secret))
    assert "cannot read image cat/x.jpg (not an image)" in error(tmp_path / "a.zip")


def test_a_small_tar_gz_that_fills_the_disk_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SMALL", 1 << 24)
    (tmp_path / "a.tgz").write_bytes(gzip.compress(bytes(1 << 26)))
    text = error(tmp_path / "a.tgz")
    assert "bytes unpack to more than 16777216, and no images do that" in text
    monkeypatch.setattr(limits, "SMALL", 1 << 30)
    monkeypatch.setattr("pupil.data.tree.shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    assert "the disk of temporary files has no more room" in error(tmp_path / "a.tgz")


def test_a_tar_gz_whose_sizes_are_lies_is_refused(tmp_path: Path) -> None:
    raw = bytearray(gzip.decompress(tar_of(tmp_path / "a.tgz", *PLAIN).read_bytes()))
    for size in (b"77777777777\0", b"\x80" + b"\0" * 3 + b"\x7f" * 8, b"\xff" * 12):
        raw[124:136] = size
        raw[148:156] = b" " * 8
        raw[148:156] = f"{sum(raw[:512]):06o}\0 ".encode()
        (tmp_path / "a.tgz").write_bytes(gzip.compress(bytes(raw)))
        assert "cannot be read" in error(tmp_path / "a.tgz")


def test_a_zip_that_bursts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_BZIP2) as archive:
        for name in ("cat/a.bmp", "dog/a.bmp"):
            archive.writestr(name, bytes(1 << 24))  # bzip2 packs them to 113 bytes
    assert len(bz2.compress(bytes(1 << 24))) < 200
    assert "which no honest .zip does; nothing was read" in error(tmp_path / "a.zip")
    monkeypatch.setattr(limits, "MOST_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in PETS:
            archive.writestr(name, bytes(1001))
    assert "has 1001 bytes, more than 1000" in error(tmp_path / "a.zip")


def test_a_zip_entry_never_gives_more_than_its_table_of_contents_says(tmp_path: Path) -> None:
    """The limit looks at the declared size, so unpacking must stop there."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/a.bmp", bytes(1 << 20))
    raw = bytearray((tmp_path / "a.zip").read_bytes())
    declared = struct.pack("<I", 1 << 20)
    while (at := raw.find(declared)) >= 0:
        raw[at : at + 4] = struct.pack("<I", 10)
    (tmp_path / "a.zip").write_bytes(raw)
    tree = list_tree("data.path", str(tmp_path / "a.zip"))
    with pytest.raises(zipfile.BadZipFile):
        opener(tree)("cat/a.bmp")


def test_a_pathless_zip_is_refused(tmp_path: Path) -> None:
    raw = as_zip(PETS, tmp_path / "a").read_bytes()
    for spoiled in (raw[:200], raw[:-30], b"PK\x05\x06" + b"\xff" * 18, raw[:-22] + raw[-22:].replace(b"\0", b"\xff")):
        (tmp_path / "a.zip").write_bytes(spoiled)
        assert "data.path is" in error(tmp_path / "a.zip")


# --- prepared data, descriptions and checkpoints ------------------------------------------------------------------------


@pytest.fixture
def data(pets: Path, tmp_path: Path) -> Path:
    prepare(Data(name="folder", path=str(pets), image_size=8), tmp_path / "data")
    return tmp_path / "data"


def header(path: Path) -> tuple[dict[str, dict[str, object]], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


@pytest.mark.parametrize(
    "change",
    [
        {"images": {"data_offsets": [-8, 100]}},
        {"images": {"data_offsets": [0, 1 << 60]}},
        {"images": {"shape": [1 << 40, 3, 8, 8]}},
        {"images": {"shape": ["x"]}},
        {"images": {"shape": [-1, -1, 3, 64]}},
        {"labels": {"dtype": "F8"}},
        {"labels": {"shape": [1, 1, 1, 1]}},
        {"labels": None},
        {"labels": 3},
        {"__metadata__": {"image_size": "-8"}},
        {"__metadata__": {"image_size": str(10**9)}},
    ],
    ids=str,
)
def test_a_header_that_lies_is_refused(change: dict[str, object], data: Path) -> None:
    path = data / "train.safetensors"
    head, rest = header(path)
    for key, value in change.items():
        head[key] = {**head[key], **value} if isinstance(value, dict) else value  # type: ignore[assignment]
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest)
    with pytest.raises(UserError, match="is damaged") as caught:
        load(data)
    assert "\n" not in str(caught.value)


def test_a_header_as_large_as_the_memory_is_not_read(data: Path) -> None:
    with open(data / "val.safetensors", "wb") as file:
        file.write(struct.pack("<Q", MOST + 1))
        file.truncate(4 << 30)
    tracemalloc.start()
    with pytest.raises(ValueError, match="has a header of 100000001 bytes, more than"):
        open_split(data / "val.safetensors")
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    with pytest.raises(UserError, match="damaged"):
        published.read(data / "val.safetensors")


@pytest.mark.parametrize(
    "change", [{"mean": [0.1, 0.2, 0.3]}, {"classes": ["a", "b"]}, {"counts": {}}, {"augment": {"pad": 9}}]
)
def test_a_manifest_that_was_changed_is_refused(change: dict[str, object], data: Path) -> None:
    path = data / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(
        UserError, match=r"is damaged \(manifest.json is not what its digest says\); delete it and prepare it again"
    ):
        load(data)


@pytest.mark.parametrize("content", ["[" * 200_000, '{"a":' * 200_000, "9" * 5000], ids=["lists", "objects", "a number"])
def test_json_that_exhausts_the_stack_is_damaged(content: str, data: Path, tmp_path: Path) -> None:
    (data / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="is damaged"):
        load(data)
    (tmp_path / checkpoint.META).write_text(content)
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.read_meta(tmp_path)


def test_json_that_exhausts_the_memory_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / checkpoint.META, "wb") as file:
        file.truncate(jsonfile.MOST + 1)
    tracemalloc.start()
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.read_meta(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def bomb(path: Path) -> None:
    """A checkpoint as torch writes it, but packed: 64 MB of zeros in some kilobytes."""
    torch.save({"model": {"w": torch.zeros(1 << 24)}}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in parts.items():
            archive.writestr(name, raw)


def expanded(path: Path) -> None:
    """A tensor of a trillion numbers that are all one."""
    torch.save({"model": {"w": torch.zeros(1).expand(1 << 40)}}, path)


def sparse(path: Path) -> None:
    few = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.tensor([1.0]), (1 << 40,), check_invariants=True)
    torch.save({"model": {"w": few}}, path)


@pytest.mark.parametrize("make", [bomb, expanded, sparse], ids=lambda f: f.__name__)
def test_a_checkpoint_that_bursts_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "a.pth")
    with pytest.raises(UserError) as caught:
        published.read(tmp_path / "a.pth")
    assert "\n" not in str(caught.value)
    assert "a.pth" in str(caught.value)


CODE = """
from pathlib import Path

Path("ran").touch()


def net(classes):
    return None
"""


@pytest.mark.parametrize("name", ["theirs/code.py:net", "theirs.code:net", "antigravity:fly", "os:_exit"])
def test_a_model_folder_from_elsewhere_runs_no_code(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its model.json may name a network of the user's own; here the code came with the folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(external, "HOME", tmp_path)
    monkeypatch.setattr(external, "ASKED", set())
    as_folder({"theirs/code.py": CODE.encode()}, tmp_path)
    meta = {"network": name, "method": None, "surgery": {}, "classes": ["a", "b"], "image_size": 16}
    checkpoint.save(tmp_path / "theirs/model", {}, {**meta, "mean": [0.5] * 3, "std": [0.5] * 3})
    with pytest.raises(UserError, match="which nothing here has asked for; it was not run"):
        checkpoint.load(tmp_path / "theirs/model")
    assert not (tmp_path / "ran").exists()
    if name.endswith(".py:net"):  # the user asks for it: it is run (and is no network)
        (tmp_path / "theirs").rename(tmp_path / "networks")
        path = tmp_path / "networks/model" / checkpoint.META
        path.write_text(path.read_text().replace("theirs/", "networks/"))
        with pytest.raises(UserError, match=r"must return an nn\.Module"):
            checkpoint.load(tmp_path / "networks/model")
        assert (tmp_path / "ran").exists()


def test_a_header_of_safetensors_that_overlaps_or_leads_out_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4), "b": torch.ones(4)}, tmp_path / "a.safetensors")
    head, rest = header(tmp_path / "a.safetensors")
    for offsets in ([0, 16], [16, 1 << 40], [8, 24], [-16, 0]):
        text = json.dumps({**head, "b": {**head["b"], "data_offsets": offsets}}).encode()
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + rest)
        with pytest.raises(UserError, match="is truncated, damaged or no safetensors file"):
            published.read(tmp_path / "a.safetensors")


def test_this_test_would_notice_deep_json() -> None:
    with pytest.raises(RecursionError):
        json.loads("[" * (sys.getrecursionlimit() * 100))
