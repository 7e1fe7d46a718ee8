"""What manifest.json and model.json both say of images and classes, and what of it can be: a file may be a stranger's."""

from collections.abc import Callable, Mapping
from typing import Any

MOST_CLASSES, MOST_PIXELS = 1_000_000, 8192  # a description must not make a network that fills the memory


def names(x: Any) -> bool:
    return isinstance(x, list) and 0 < len(x) <= MOST_CLASSES and all(isinstance(name, str) for name in x)


def three(x: Any) -> bool:
    """A finite number for each channel."""
    return isinstance(x, list) and len(x) == 3 and all(type(v) in (int, float) and abs(v) < 1e6 for v in x)


IMAGES: Mapping[str, Callable[[Any], bool]] = {
    "classes": names,
    "image_size": lambda x: type(x) is int and 1 <= x <= MOST_PIXELS,
    "mean": three,
    "std": lambda x: three(x) and min(x) > 0,
}


def wrong(found: Mapping[str, Any], kinds: Mapping[str, Callable[[Any], bool]]) -> str | None:
    """The first key that is missing or cannot be."""
    return next((key for key, right in kinds.items() if key not in found or not right(found[key])), None)
