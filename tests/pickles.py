"""Finds pickles in bytes: on their own, in the middle of a file, in archives."""

import gzip
import io
import pickletools
import re
import tarfile
import zipfile
from collections.abc import Iterator

BEGINS = re.compile(rb"\x80[\x02-\x05]")  # protocols 2 to 5 say so at their start
LEAST_BYTES, LEAST_OPCODES = 12, 5  # shorter ones occur by chance among the numbers of weights
NAMES = (".pkl", ".pickle", ".pt", ".pth", ".joblib", ".npy", ".npz", ".ckpt", ".bin")


def pickles(name: str, raw: bytes) -> Iterator[str]:
    """Where one is, in words."""
    if name.endswith(NAMES):
        yield f"{name}: called like one"
    if length(raw) == len(raw.rstrip(b"\n")) and raw:
        yield f"{name}: the whole file, {len(raw)} bytes"
    for match in BEGINS.finditer(raw):
        if length(raw[match.start() :]):
            yield f"{name}: at byte {match.start()}"
    yield from inside(name, raw)


def inside(name: str, raw: bytes) -> Iterator[str]:
    """Archives, also those in archives."""
    if raw[:2] == b"\x1f\x8b":
        yield from pickles(f"{name}/gz", gzip.decompress(raw))
    if raw[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            for part in archive.namelist():
                yield from pickles(f"{name}/{part}", archive.read(part))
    if raw[257:262] == b"ustar":
        with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
            for member in archive:
                if file := archive.extractfile(member):
                    yield from pickles(f"{name}/{member.name}", file.read())


def length(raw: bytes) -> int:
    """Of the pickle that the bytes begin with; 0: with none."""
    try:
        places = [position or 0 for _, _, position in pickletools.genops(raw)]
        if len(places) < LEAST_OPCODES or places[-1] < LEAST_BYTES:
            return 0
        pickletools.dis(raw, io.StringIO())  # keeps account of the stack
    except Exception:  # whatever other bytes look like to it
        return 0
    return places[-1] + 1
