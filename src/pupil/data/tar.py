"""The members of a tar file: their names, places and sizes, from the headers alone.

Long names and large sizes are read in the ways of POSIX (ustar, pax) and of GNU tar.  What is damaged, cut short or stored
with holes is refused with a ValueError; a size is never believed beyond the end of the file.
"""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK = 512
WINDOW = 16 * BLOCK  # bytes of one reading: small members and the headers around them come with it
MOST_EXTRA = 1 << 20  # bytes of a long name, of pax records, of zeros behind the end
PLAIN, EMPTY, EXTRA = b"0\x007", b"123456", b"LKxXg"  # kinds of members: files; without content; about the next member
CUT = "it is cut short; fetch it again"


class Member(NamedTuple):
    name: str
    start: int  # first byte of its content
    size: int
    plain: bool  # a file; else a link, a device, or what no standard knows


class Reader:
    """A file of which parts are asked for, mostly small ones in rising order."""

    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self.file).st_size
        self.start, self.held = 0, b""

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.file)

    def read(self, start: int, size: int) -> bytes:
        inside = start - self.start
        if inside < 0 or inside + size > len(self.held):
            self.held, self.start, inside = read_at(self.file, start, max(size, WINDOW)), start, 0
        if inside + size > len(self.held):
            raise ValueError(CUT)
        return self.held[inside : inside + size]


def read_at(file: int, start: int, size: int) -> bytes:
    """Fewer bytes than `size` only at the end of the file."""
    raw = os.pread(file, size, start)
    while len(raw) < size and (more := os.pread(file, size - len(raw), start + len(raw))):
        raw += more
    return raw


def members(reader: Reader) -> Iterator[Member]:
    """All but the folders, in the order of the file."""
    at, extra = 0, {}
    while any(header := reader.read(at, BLOCK)):
        check_sum(header, at)
        kind, size = header[156:157], number(header[124:136], at)
        at += BLOCK
        if kind in EXTRA:
            if size > MOST_EXTRA:
                raise ValueError(
                    f"its header at byte {at - BLOCK} asks for {size} bytes, more than {MOST_EXTRA}; get it elsewhere"
                )
            extra |= told(kind, reader.read(at, size))
        else:
            name, size = name_of(header, extra), content(kind, size, extra)
            if at + size > reader.size:
                raise ValueError(CUT)
            if not name.endswith("/"):
                yield Member(name.removeprefix("./"), at, size, kind in PLAIN)
            extra = {}
        at += -(-size // BLOCK) * BLOCK
    if reader.size - at > MOST_EXTRA or any(reader.read(at, reader.size - at)):
        raise ValueError("more follows after its end, as in several tar files joined to one; give them one by one")


def check_sum(header: bytes, at: int) -> None:
    """The low half of Adler-32 is the sum of all bytes and 1, modulo 65521; the field itself counts as spaces."""
    found = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * ord(" ")
    if (found - number(header[148:156], at)) % 65521:
        raise ValueError(broken(at))


def broken(at: int) -> str:
    return f"it is no tar file, or damaged at byte {at}; fetch it again, and unpack it if it is compressed"


def number(field: bytes, at: int) -> int:
    """Octal digits, or with the first bit set GNU's base 256."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    if digits.strip(b"01234567"):
        raise ValueError(broken(at))
    return int(digits or b"0", 8)


def told(kind: bytes, raw: bytes) -> dict[bytes, bytes]:
    """What a member's extra header says about it, by the names of pax."""
    if kind == b"L":
        return {b"path": raw.partition(b"\0")[0]}
    found = {} if kind == b"K" else records(raw)
    if kind == b"g" and found.keys() & {b"path", b"size"}:
        raise ValueError("a global header gives all members one name or size; get it elsewhere")
    return {} if kind == b"g" else found


def records(raw: bytes) -> dict[bytes, bytes]:
    """pax: "LENGTH KEY=VALUE" and a line feed, the length that of all of it."""
    found, at = {}, 0
    while raw[at : at + 1].strip(b"\0"):
        space = raw.find(b" ", at, at + 8)
        digits = raw[at : max(space, at)]
        end = at + int(digits) if digits.isdigit() else 0
        if not space < end <= len(raw) or raw[end - 1 : end] != b"\n":
            raise ValueError("the pax records of a member are damaged; fetch it again")
        key, _, value = raw[space + 1 : end - 1].partition(b"=")
        found[key], at = value, end
    return found


def name_of(header: bytes, extra: dict[bytes, bytes]) -> str:
    name = extra.get(b"path") or header[:100].partition(b"\0")[0]
    if b"path" not in extra and header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    text = name.decode("utf-8", "backslashreplace") + "/" * (header[156:157] == b"5" and not name.endswith(b"/"))
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def content(kind: bytes, size: int, extra: dict[bytes, bytes]) -> int:
    """Bytes between this header and the next."""
    if kind in b"SM" or any(key.startswith(b"GNU.sparse") for key in extra):
        raise ValueError("it holds sparse files or is a part of a volume; pack it again without --sparse and --multi-volume")
    if b"size" in extra:
        digits = extra[b"size"]
        if not digits.isdigit() or len(digits) > 19:
            raise ValueError("the pax records of a member are damaged; fetch it again")
        size = int(digits)
    return 0 if kind in EMPTY else size
