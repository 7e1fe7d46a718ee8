"""What a user calls a run -> its record: by folder, uid, id in MLflow, name, or row of the comparison."""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pupil import record
from pupil.checkpoint import META, WEIGHTS
from pupil.config import HOME
from pupil.types import UserError


class Found(NamedTuple):
    """A record, where it lies, and what may be said about how it was found."""

    folder: Path
    facts: dict[str, Any]
    note: str = ""

    @property
    def weights(self) -> str | None:
        """SHA-256 of what the run left."""
        return self.facts.get("outputs", {}).get(WEIGHTS)

    @property
    def model(self) -> Path | None:
        """Where it left them."""
        return (self.folder / self.facts["model"]).resolve() if self.facts.get("model") else None


def sound(roots: Iterable[Path]) -> Iterator[Found]:
    """The records below the roots, but for the damaged ones, which `sync` names."""
    for folder in record.find(roots):
        with contextlib.suppress(UserError, OSError):
            yield Found(folder, record.read(folder))


class Records:
    """All sound records of the checkout."""

    def __init__(self) -> None:
        self.all = list(sound([HOME / "out" / "records", HOME / "runs"]))

    def of_weights(self, sha256: str, hint: str | Path | None = None) -> Found | None:
        """The run that left these weights; of equal trainings, which leave equal weights, that of this uid or model folder."""
        made = [found for found in self.all if found.weights == sha256]
        hint = hint.resolve() if isinstance(hint, Path) else hint
        return next((found for found in made if hint in (found.facts["uid"], found.model)), made[0] if made else None)

    def of_data(self, digest: str) -> Found | None:
        """The preparation of these data."""
        tagged = (found for found in self.all if found.facts["stage"] == "prepare")
        return next((found for found in tagged if (found.facts.get("data") or {}).get("digest") == digest), None)


def find(text: str, records: Records) -> Found:
    """The one run that `text` means."""
    for path in (Path(text), HOME / text):
        if path.is_dir():
            return in_folder(path, records)
    named = [found for found in records.all if found.facts["name"] == text]
    if named:
        return one(text, named)
    if row := in_table(text, records):
        return row
    if re.fullmatch(r"[0-9a-f]{4,32}", text):
        if begun := [found for found in records.all if found.facts["uid"].startswith(text)]:
            return one(text, begun)
        if there := in_store(text, records):
            return there
    raise UserError(
        f"there is no run {text!r}: give the folder of a record or of a model, the id of a run in MLflow, the uid of a record,"
        " or the name of a row in reports/table.md"
    )


def one(text: str, found: Sequence[Found]) -> Found:
    if len(found) > 1:
        places = ", ".join(shown(f.folder) for f in found[:4]) + (", ..." if found[4:] else "")
        raise UserError(f"{text!r} means {len(found)} runs; give the folder of one: {places}")
    return found[0]


def in_folder(path: Path, records: Records) -> Found:
    """A record folder, a model folder, or the folder of a run by hand, which holds both."""
    for folder in (path, path / "record"):
        if (folder / "record.json").exists():
            return Found(folder, record.read(folder))
    if not (path / META).exists():
        raise UserError(f"{path} holds neither record.json nor {META}: give the folder of a record or of a model")
    weights = record.sha256(path / WEIGHTS) if (path / WEIGHTS).exists() else None
    if weights is None or (found := records.of_weights(weights, path)) is None:
        raise UserError(f"no record below out/records or runs left the weights in {path}; nothing more is known of them")
    return found


def in_table(text: str, records: Records) -> Found | None:
    """A row of the comparison: the first of its networks."""
    try:
        rows = json.loads((HOME / "reports" / "networks.json").read_text())
        folders = [HOME / row["folder"] for row in rows if row["family"] == text]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    if not folders:
        return None
    others = ", ".join(shown(folder) for folder in folders[1:])
    note = f"the first of {len(folders)} networks in this row; the others: {others}" if others else ""
    return in_folder(folders[0], records)._replace(note=note)


def in_store(text: str, records: Records) -> Found | None:
    """A run in MLflow, by its id or the beginning of it; what is not on this machine is fetched from there."""
    from pupil import tracking

    found = tracking.look_up(HOME, text)
    if found is None:
        return None
    uid, fetch = found
    if here := [f for f in records.all if f.facts["uid"] == uid]:
        return here[0]
    folder = HOME / ".work" / "why" / uid / "record"
    fetch(folder)
    return Found(folder, record.read(folder), "its record is not on this machine; it was fetched from MLflow")


def shown(path: Path) -> str:
    """As short as it can be typed in the checkout."""
    path = path.resolve()
    return str(path.relative_to(HOME.resolve()) if path.is_relative_to(HOME.resolve()) else path)
