"""The samples of a WebDataset shard: of each an image and its label.

A sample is the files of a tar that share their key and follow one another; the key is the name up to the first dot after
the last slash, what follows says what a file is.  The label is the text of the `.cls`, or in the `.json` the first of
`label`, `cls`, `class` that is a whole number or a text.  Other files (captions, masks) are left out.
"""

import re
from collections.abc import Iterator
from itertools import groupby, islice
from operator import itemgetter
from typing import Any, NamedTuple

from pupil.data.limits import HIDDEN, counted
from pupil.data.tar import Member, Reader, members
from pupil.data.tree import SUFFIXES
from pupil.jsonfile import parse

KEYS = ("label", "cls", "class")
MOST_LABEL = 1 << 20  # bytes of a .cls or .json
MOST_NAME = 200  # characters of a class's name
MOST_FILES = 1000  # of a sample
LEFT_OUT = re.compile(f"(?:^|/)(?:{'|'.join(map(re.escape, HIDDEN))})")
NUMBER = re.compile("-?[0-9]{1,18}")

Label = int | str


class Sample(NamedTuple):
    name: str  # of the image
    start: int
    size: int
    label: Label


def samples(about: str, reader: Reader) -> Iterator[Sample]:
    """In the order of the file; ValueError where a sample is not whole, so that none is lost."""
    entries = counted(about, ((member.name, member) for member in members(reader)))
    named = ((*split_name(name), member) for name, member in entries if not LEFT_OUT.search(name))
    for key, group in groupby(((key, kind, member) for key, kind, member in named if kind), key=itemgetter(0)):
        files = list(islice(group, MOST_FILES + 1))
        if len(files) > MOST_FILES:
            raise ValueError(
                f"more than {MOST_FILES} files have the key {key[:100]!r}, the name up to its first dot; rename them"
            )
        sample = whole(reader, key, [(kind, member) for _, kind, member in files])
        if sample is not None:
            yield sample


def split_name(name: str) -> tuple[str, str]:
    """Key and extension, in small letters."""
    folder, slash, file = name.rpartition("/")
    key, _, kind = file.partition(".")
    return folder + slash + key, kind.lower()


def whole(reader: Reader, key: str, files: list[tuple[str, Member]]) -> Sample | None:
    """None: neither image nor label."""
    images = [member for kind, member in files if f".{kind}" in SUFFIXES]
    texts = [(kind, member) for kind, member in files if kind in ("cls", "json")]
    for member in (*images, *(member for _, member in texts)):
        if not member.plain:
            raise ValueError(f"{member.name} is a link or a device; pack it again with tar --dereference --hard-dereference")
    found = labels(reader, texts)
    dotted = next((member.name for kind, member in files if kind.endswith(SUFFIXES)), None)
    if len(images) > 1:
        raise ValueError(f"{images[0].name} and {images[1].name} are two images of one sample; keep one of them")
    if images and found:
        agree(found)
        return Sample(images[0].name, images[0].start, images[0].size, found[0][1])
    if images:
        raise ValueError(
            f"{images[0].name} has no label: {key}.cls, or {' or '.join(KEYS)} in {key}.json, must be next to it in the tar "
            "(tar --sort=name); a tar of class folders is read by data.name=folder"
        )
    if dotted:
        raise ValueError(f"{dotted} is no image of a sample: dots must not be in its name but before the ending; rename it")
    if found:
        raise ValueError(f"{found[0][0]} is the label of no image; pack the shard again, each image next to its label")
    return None


def agree(found: list[tuple[str, Label]]) -> None:
    """A number and a name may be two words for one class; two numbers or two names are not."""
    first = {}
    for place, label in found:
        where, other = first.setdefault(type(label), (place, label))
        if other != label:
            raise ValueError(f"two labels of one image: {other!r} in {where}, {label!r} in {place}; correct one of them")


def labels(reader: Reader, texts: list[tuple[str, Member]]) -> list[tuple[str, Label]]:
    """Where each one stands, and the label; those of a .cls first."""
    found = []
    for kind, member in sorted(texts, key=itemgetter(0)):
        if member.size > MOST_LABEL:
            raise ValueError(f"{member.name} has {member.size} bytes, more than {MOST_LABEL}, and is no label; correct it")
        raw = reader.read(member.start, member.size)
        try:
            text = raw.decode()
            content = {} if kind == "cls" else parse(text)
        except ValueError as error:
            raise ValueError(f"{member.name} is no {kind} file that can be read ({error}); correct it") from None
        values = [(member.name, text)] if kind == "cls" else in_json(member.name, content)
        found += [(place, as_label(place, value)) for place, value in values]
    return found


def in_json(name: str, content: Any) -> list[tuple[str, Label]]:
    values = (
        [(f"{key} of {name}", content[key]) for key in KEYS if content.get(key) is not None]
        if isinstance(content, dict)
        else []
    )
    fitting = [(place, value) for place, value in values if isinstance(value, int | str) and not isinstance(value, bool)]
    if values and not fitting:
        raise ValueError(f"{values[0][0]} is {str(values[0][1])[:100]!r}; a whole number or a text is needed")
    return fitting


def as_label(place: str, value: Label) -> Label:
    text = str(value).strip()
    if not text or not text.isprintable() or len(text) > MOST_NAME:
        raise ValueError(f"{place} is {text[:100]!r}; a whole number or the name of a class is needed, on one line")
    return int(text) if NUMBER.fullmatch(text) else text
