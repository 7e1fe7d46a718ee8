"""The headers of tar files: every way of writing names and sizes is read as tarfile does, and nothing hostile is believed."""

import gzip
import io
import os
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pupil.data.tar import BLOCK, Member, Reader, members

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = f"{'a' * 90}/{'b' * 60}/{'c' * 120}.jpg"
Content = tuple[str, bytes, dict[str, Any]]  # name, bytes, what else a header says


def pack(path: Path, *contents: Content, form: str = "pax") -> Path:
    with tarfile.open(path, "w", format=FORMATS[form]) as archive:
        for name, raw, facts in contents:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            for key, value in facts.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(raw))
    return path


def listed(path: Path) -> list[Member]:
    with Reader(path) as reader:
        return list(members(reader))


def by_tarfile(path: Path) -> list[Member]:
    with tarfile.open(path) as archive:
        return [
            Member(m.name.removeprefix("./"), m.offset_data, m.size if m.isfile() else 0, m.isfile())
            for m in archive
            if not m.isdir()
        ]


def with_header(raw: bytes, at: int, **fields: bytes) -> bytes:
    """The tar with other fields in the header at a byte, and its sum right."""
    places = {"size": (124, 12), "kind": (156, 1), "name": (0, 100)}
    header = bytearray(raw[at : at + BLOCK])
    for key, value in fields.items():
        start, size = places[key]
        header[start : start + size] = value.ljust(size, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return raw[:at] + bytes(header) + raw[at + BLOCK :]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "name", ["a.jpg", "./a.jpg", "d/" + "e" * 98, "f" * 100, "g" * 90 + "/" + "h" * 100, "ü" * 60 + ".jpg", LONG]
)
def test_names_are_read_in_every_format(form: str, name: str, tmp_path: Path) -> None:
    if form == "ustar" and len(name.rpartition("/")[2].encode()) > 100:
        pytest.skip("ustar has no such names")
    path = pack(tmp_path / "a.tar", ("first", b"1", {}), (name, b"2" * 700, {}), ("last", b"", {}), form=form)
    assert listed(path) == by_tarfile(path)
    assert listed(path)[1].name == name.removeprefix("./")
    with Reader(path) as reader:
        assert [reader.read(m.start, m.size) for m in listed(path)] == [b"1", b"2" * 700, b""]


@given(
    contents=st.lists(st.tuples(st.text("ab./é", min_size=1, max_size=150), st.binary(max_size=1100)), max_size=6),
    form=st.sampled_from(["gnu", "pax"]),
)
def test_lists_are_those_of_tarfile(
    contents: list[tuple[str, bytes]], form: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = pack(
        tmp_path_factory.mktemp("tar") / "a.tar", *[(name.strip("/") or "x", raw, {}) for name, raw in contents], form=form
    )
    assert listed(path) == by_tarfile(path)


def test_names_that_cannot_be_printed_are_escaped(tmp_path: Path) -> None:
    raw = pack(tmp_path / "a.tar", ("a.jpg", b"", {})).read_bytes()
    (tmp_path / "a.tar").write_bytes(with_header(raw, 0, name="é\n\x1b".encode() + b"\xff.jpg"))
    assert [m.name for m in listed(tmp_path / "a.tar")] == ["é\\n\\x1b\\xff.jpg"]


def test_sizes_in_base_256_and_in_pax_records_are_read(tmp_path: Path) -> None:
    raw = pack(tmp_path / "a.tar", ("a.jpg", b"x" * 600, {}), ("b.jpg", b"y", {})).read_bytes()
    wide = with_header(raw, 0, size=b"\x80" + (600).to_bytes(11, "big"))
    (tmp_path / "b.tar").write_bytes(wide)
    assert listed(tmp_path / "b.tar") == listed(tmp_path / "a.tar")
    path = pack(tmp_path / "c.tar", ("a.jpg", b"x" * 600, {"pax_headers": {"size": "600"}}), ("b.jpg", b"y", {}))
    size_at = next(m.start for m in listed(path)) - BLOCK
    path.write_bytes(with_header(path.read_bytes(), size_at, size=b"00000000000"))
    assert [(m.name, m.size) for m in listed(path)] == [("a.jpg", 600), ("b.jpg", 1)]


def test_folders_are_left_out_and_links_and_devices_are_no_files(tmp_path: Path) -> None:
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
    odd: list[Content] = [(f"odd{i}", b"", {"type": kind, "linkname": "/etc/passwd"}) for i, kind in enumerate(kinds)]
    path = pack(tmp_path / "a.tar", ("d", b"", {"type": tarfile.DIRTYPE}), *odd, ("a.jpg", b"x", {}))
    assert [(m.name, m.plain, m.size) for m in listed(path)] == [
        *((f"odd{i}", False, 0) for i in range(len(kinds))),
        ("a.jpg", True, 1),
    ]


PLAIN: list[Content] = [("a.jpg", b"x" * 600, {}), ("b.jpg", b"y" * 600, {})]
SECOND = 3 * BLOCK  # where the header of b.jpg is
END = 2 * SECOND

SPOILED = {
    "empty": (lambda raw: b"", "cut short"),
    "in the first header": (lambda raw: raw[:300], "cut short"),
    "in a content": (lambda raw: raw[: SECOND + BLOCK + 10], "cut short"),
    "between two members": (lambda raw: raw[:SECOND], "cut short"),
    "in the padding of the last": (lambda raw: raw[: END - 10], "cut short"),
    "without an end": (lambda raw: raw[:END], "cut short"),
    "joined": (lambda raw: raw + raw, "more follows after its end"),
    "a long tail": (lambda raw: raw + bytes(1 << 21), "more follows after its end"),
    "another file": (lambda raw: b"PK\x03\x04" + b"zip" * 1000, "no tar file"),
    "packed": (lambda raw: gzip.compress(os.urandom(1000) + raw), "unpack it if it is compressed"),
    "a damaged header": (lambda raw: raw[: SECOND + 3] + b"!" + raw[SECOND + 4 :], f"damaged at byte {SECOND}"),
    "a size beyond the end": (lambda raw: with_header(raw, 0, size=b"77777777777"), "cut short"),
    "a size without end": (lambda raw: with_header(raw, 0, size=b"\x80" + b"\x7f" * 11), "cut short"),
    "a size below zero": (lambda raw: with_header(raw, 0, size=b"\xff" * 12), "damaged at byte 0"),
    "a size that is a word": (lambda raw: with_header(raw, 0, size=b"-00000000600"), "damaged at byte 0"),
    "a size in other digits": (lambda raw: with_header(raw, 0, size=b"0000000089"), "damaged at byte 0"),
    "a sparse file": (lambda raw: with_header(raw, 0, kind=b"S"), "sparse"),
    "a part of a volume": (lambda raw: with_header(raw, 0, kind=b"M"), "sparse files or is a part of a volume"),
    "a name without end": (lambda raw: with_header(raw, 0, kind=b"L", size=b"70000000000"), "asks for"),
    "records that are none": (lambda raw: with_header(raw, 0, kind=b"x"), "pax records of a member are damaged"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_is_damaged_is_refused(case: str, tmp_path: Path) -> None:
    change, said = SPOILED[case]
    raw = pack(tmp_path / "a.tar", *PLAIN).read_bytes()
    (tmp_path / "a.tar").write_bytes(change(raw))
    with pytest.raises(ValueError, match=said):
        listed(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (b"20 path=x\n", "damaged"),
        (b"-5 path=x\n", "damaged"),
        (b"3 path=x\n", "damaged"),
        (b"9999999999 path=x\n", "damaged"),
        (b"11 size=-1\n", "damaged"),
        (b"30 size=9999999999999999999999\n", "damaged"),
        (b"17 size=99999999\n", "cut short"),
        (b"22 GNU.sparse.major=1\n", "sparse"),
    ],
)
def test_pax_records_are_not_believed(records: bytes, said: str, tmp_path: Path) -> None:
    raw = pack(tmp_path / "a.tar", ("records", records, {}), *PLAIN).read_bytes()
    (tmp_path / "a.tar").write_bytes(with_header(raw, 0, kind=b"x"))
    with pytest.raises(ValueError, match=said):
        listed(tmp_path / "a.tar")


def test_a_global_header_may_say_what_it_likes_but_for_names_and_sizes(tmp_path: Path) -> None:
    for record, said in ((b"13 comment=x\n", None), (b"10 path=x\n", "one name or size"), (b"10 size=1\n", "one name or size")):
        raw = pack(tmp_path / "a.tar", ("records", record, {}), *PLAIN).read_bytes()
        (tmp_path / "a.tar").write_bytes(with_header(raw, 0, kind=b"g"))
        if said is None:
            assert [m.name for m in listed(tmp_path / "a.tar")] == ["a.jpg", "b.jpg"]
        else:
            with pytest.raises(ValueError, match=said):
                listed(tmp_path / "a.tar")


def test_a_list_reads_no_content(tmp_path: Path) -> None:
    with open(tmp_path / "a.tar", "wb") as file:  # 8 GB of nothing in a file with a hole
        file.write(with_header(bytes(BLOCK), 0, name=b"a.jpg", kind=b"0", size=b"77777777777"))
        file.truncate((1 << 33) + 3 * BLOCK)
    tracemalloc.start()
    assert listed(tmp_path / "a.tar") == [Member("a.jpg", BLOCK, (1 << 33) - 1, True)]
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
