"""Values of a record as MLflow takes them."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pupil.tracking.store import milliseconds

if TYPE_CHECKING:
    from mlflow.entities import Metric


def metrics(values: dict[str, Any], at: float, step: int, model: str | None = None) -> list["Metric"]:
    from mlflow.entities import Metric

    numbers = {plain(key): float(value) for key, value in values.items() if isinstance(value, int | float)}
    return [Metric(key, value, milliseconds(at), step, model_id=model) for key, value in numbers.items()]


def plain(name: str) -> str:
    """A name MLflow accepts."""
    return re.sub(r"[^\w\-./: ]", "_", name)[:250]


def limited(value: Any) -> str:
    """Parameters are cut at 6000 characters by MLflow; a cut value would look like the value."""
    text = str(value)
    if len(text) <= 6000:
        return text
    return f"{len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()}: see record.json"


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))
