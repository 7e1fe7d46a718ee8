"""How large a YAML page becomes when its aliases are written out: a few lines can unfold to more than the memory."""

from typing import Any

MOST = 100_000  # keys and values


def unfolds(text: bytes) -> bool:
    """Whether a page has more than `MOST` keys and values, each alias written out; what is no YAML has none."""
    import yaml

    try:
        root: Any = yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return False
    return root is not None and size(root, {}) > MOST


def size(node: Any, known: dict[int, int]) -> int:
    """Of a node of PyYAML's tree; aliases are the same node again."""
    if id(node) not in known:
        known[id(node)] = MOST + 1  # a node that is in itself has no end
        children = () if node.id == "scalar" else node.value
        known[id(node)] = 1 + sum(
            size(child, known) for item in children for child in (item if isinstance(item, tuple) else (item,))
        )
    return known[id(node)]
