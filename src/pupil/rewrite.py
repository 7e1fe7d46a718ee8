"""Changes values of a YAML text and leaves every other character as it is: comments, quotes, order, blank lines.

The parser says where a value stands in the text.  A value that is written over several lines becomes one line, the comments
between its lines stay above it; a comment behind a value keeps its column where there is room.
"""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from pupil.types import UserError

Node = Any  # of PyYAML's tree; it is imported where it is needed
COMMENT = re.compile(r"(?:^|(?<=\s))#.*", re.MULTILINE)


class Edit(NamedTuple):
    start: int
    end: int
    text: str


def rewrite(text: str, over: Mapping[str, Any], whole: str = "") -> tuple[str, list[str]]:
    """The text with the values of `over`, section by section, and a line for each that differs.

    Sections inside `whole` (a section's name) are values: they are replaced, not merged.
    """
    import yaml

    loader = yaml.SafeLoader(text)
    root = loader.get_single_node()
    tree = loader.construct_document(root)
    if not isinstance(tree, dict):
        raise UserError("the page must hold `key: value` lines")
    edits: list[Edit] = []
    changes: list[str] = []
    wanted = put(text, root, tree, over, (edits, changes), "", whole)
    for edit in sorted(edits, reverse=True):
        text = text[: edit.start] + edit.text + text[edit.end :]
    if yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) != wanted:
        raise UserError("the page is written in a way that cannot be edited (anchors, aliases or tags?); write plain values")
    return text, changes


def put(
    text: str, node: Node, tree: Any, over: Mapping[str, Any], done: tuple[list[Edit], list[str]], path: str, whole: str
) -> dict[str, Any]:
    """Notes the edits of one section; what it holds afterwards."""
    edits, changes = done
    places = {key.value: (key, value) for key, value in node.value}
    wanted, missing = dict(tree), {}
    for key, value in over.items():
        where, old = f"{path}{key}", tree.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and old and path != f"{whole}.":
            wanted[key] = put(text, places[key][1], old, value, done, f"{where}.", whole)
            continue
        wanted[key] = value
        if key not in tree:
            missing[key] = value
        elif old != value:
            edits.append(replaced(text, *places[key], flow(value)))
        if key not in tree or old != value:
            changes.append(f"{where}: {flow(old)} -> {flow(value)}")
    if missing:
        edits.append(inserted(node, missing, path, whole))
    return wanted


def inserted(section: Node, missing: Mapping[str, Any], path: str, whole: str) -> Edit:
    """New keys, before the section's first: after its last they would stand below the next section's comment."""
    first = section.value[0][0].start_mark
    if section.flow_style:
        return Edit(first.index, first.index, f"{flow(missing)[1:-1]}, ")
    start = first.index - first.column
    return Edit(start, start, block(missing, first.column, path, whole))


def replaced(text: str, key: Node, value: Node, new: str) -> Edit:
    """The edit that puts `new` in the place of a value."""
    start, end = value.start_mark.index, last(value)
    between = text[key.end_mark.index : end]
    for leaf in leaves(value):  # a # in a value is no comment
        a, b = (mark.index - key.end_mark.index for mark in (leaf.start_mark, leaf.end_mark))
        between = between[:a] + "x" * (b - a) + between[b:]
    comments = COMMENT.findall(between)
    if comments or (value.id != "scalar" and not value.flow_style):
        inner = "\n" + " " * (key.start_mark.column + 2)
        start = key.end_mark.index
        new = ":" + "".join(inner + comment.rstrip() for comment in comments) + (inner if comments else " ") + new
        return Edit(start, end, new)
    if start == end:  # nothing after the colon
        new = f" {new}"
    behind = re.compile(r"([ \t]+)#").match(text, end)
    if behind and "\n" not in text[start:end]:
        gap = max(2, len(behind[1]) + end - start - len(new))
        return Edit(start, behind.end(1), new + " " * gap)
    return Edit(start, end, new)


def last(node: Node) -> int:
    """Where a value's text ends; a block's own end mark lies behind the comments that follow it."""
    if node.id != "scalar" and not node.flow_style and node.value:
        tail = node.value[-1]
        return last(tail[1] if isinstance(tail, tuple) else tail)
    return node.end_mark.index


def leaves(node: Node) -> list[Node]:
    if node.id == "scalar":
        return [node]
    children = [n for child in node.value for n in (child if isinstance(child, tuple) else (child,))]
    return [leaf for child in children for leaf in leaves(child)]


def block(tree: Mapping[str, Any], column: int, path: str, whole: str) -> str:
    """Lines of `key: value`, sections below their names."""
    lines = ""
    for key, value in tree.items():
        section = isinstance(value, Mapping) and path != f"{whole}."
        lines += " " * column + f"{key}:"
        lines += f"\n{block(value, column + 2, f'{path}{key}.', whole)}" if section else f" {flow(value)}\n"
    return lines


def flow(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {flow(v)}" for key, v in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(flow, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):  # without an exponent: YAML 1.1, which some readers speak, takes 4e-05 for a text
        text = format(Decimal(repr(value)), "f")
        return text if "." in text else f"{text}.0"
    return str(value)
