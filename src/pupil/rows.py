"""The networks of the comparison, and a row of everything measured of each.

Quality comes from the test predictions that each training saved; cost (parameters, MACs, bytes, latency) from the
network itself.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pupil import checkpoint, measures
from pupil.arrays import load_arrays
from pupil.assemble import find
from pupil.net import Net, cut
from pupil.places import PREDICTIONS
from pupil.settings import Settings
from pupil.types import UserError


class Cell(NamedTuple):
    """One trained network of the pipeline."""

    family: str  # what is averaged over seeds
    baseline: str | None  # the family it is compared with
    teacher: Path | None  # whose predictions it should agree with
    seed: int
    folder: Path


def cells(s: Settings) -> list[Cell]:
    """The cells that params.yaml names; what else lies in out/ is not looked at."""
    root = Path("out/models")
    found = [Cell(t, None, None, s.teacher.seed, root / "teacher" / t) for t in s.teachers]
    found += [
        Cell(f"{t} (SH-KD, {n})", t if t in s.teachers else None, None, s.teacher.seed, root / "shkd" / f"{t}-{n}")
        for t in s.shkd
        for n in s.students
    ]
    found += [Cell(f"{n} alone", None, None, seed, root / "student" / n / str(seed)) for n in s.students for seed in s.seeds]
    for kind, teachers, mark in (("distill", s.teachers, ""), ("distill_shkd", s.shkd, " (SH-KD)")):
        for t in teachers:
            for n in s.students:
                teacher = root / "teacher" / t if kind == "distill" else root / "shkd" / f"{t}-{n}"
                found += [
                    Cell(f"{n} by {m} from {t}{mark}", f"{n} alone", teacher, seed, root / kind / f"{t}-{n}" / m / str(seed))
                    for m in s.methods
                    for seed in s.seeds
                ]
    found += [
        Cell(
            f"{n} by {m} from {t}",
            f"{n} alone",
            root / "teacher" / t,
            seed,
            root / "table" / f"{t}-{n}" / table.name / str(seed) / m,
        )
        for t in s.teachers
        for n in s.students
        for table in s.tables
        for m in table.methods
        for seed in s.seeds
    ]
    return found


def describe_all(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row for each cell, and behind a teacher's one for what is left of it where students know only some of its classes."""
    costs: dict[str, dict[str, float]] = {}
    taught = {cell.teacher: cell for cell in reversed(cells)}  # one student of each teacher
    rows = []
    for cell in cells:
        rows.append(describe(cell, costs))
        if cell.folder in taught and (row := describe_cut(cell, taught[cell.folder], costs)):
            rows.append(row)
    return rows


def describe(cell: Cell, costs: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Everything measured of one network."""
    folder = find(str(cell.folder))
    net, meta = checkpoint.load(folder)
    saved = predictions(folder)
    logits, labels = saved["deployed"], saved["labels"]
    row = measured(cell, net, meta, logits, labels, costs)
    if "imported" in meta:
        row["imported"] = meta["imported"]["sha256"]
    for name in {"last", "best_by_val"} & saved.keys():  # an import has neither
        row[f"{name}/top1"] = measures.quality(saved[name], labels)["top1"]
    if "teacher" in saved:
        row["agreement"] = measures.agreement(logits, saved["teacher"])
    elif cell.teacher is not None and checkpoint.read_meta(find(str(cell.teacher)))["classes"] == meta["classes"]:
        row["agreement"] = measures.agreement(logits, predictions(find(str(cell.teacher)))["deployed"])
    return row


def predictions(folder: Path, *more: str) -> dict[str, Tensor]:
    """What a training answered on the test images: logits (N, K) of each name, and labels (N,)."""
    saved = load_arrays(folder / PREDICTIONS, "deployed", "labels", *more)
    images = len(saved["labels"])
    if not images or any(part.ndim != 1 + (name != "labels") or len(part) != images for name, part in saved.items()):
        raise UserError(f"{folder / PREDICTIONS} is damaged: its arrays do not fit together; delete {folder} and run dvc repro")
    return saved


def describe_cut(cell: Cell, student: Cell, costs: dict[str, dict[str, float]]) -> dict[str, Any] | None:
    """A teacher with its students' classes alone, on their test images; None if it has no others."""
    ours = checkpoint.read_meta(find(str(student.folder)))
    kept = ours["teacher"].get("cut")
    if kept is None:
        return None
    net, meta = checkpoint.load(find(str(cell.folder)))
    cut(net, kept["kept"])
    saved = predictions(find(str(student.folder)), "teacher")
    short = cell._replace(family=f"{cell.family} cut to {len(kept['kept'])} classes")
    row = measured(short, net, meta | {"classes": ours["classes"]}, saved["teacher"], saved["labels"], costs)
    return row | {"cut": True}


def measured(
    cell: Cell, net: Net, meta: dict[str, Any], logits: Tensor, labels: Tensor, costs: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """What every network has; `costs` remembers those of equal architectures."""
    row: dict[str, Any] = {"family": cell.family, "baseline": cell.baseline, "seed": cell.seed, "folder": str(cell.folder)}
    row |= {"network": meta["network"], "method": meta["method"], "epoch": meta["epoch"], "selection": meta["selection"]}
    row |= measures.quality(logits, labels)
    accuracies = zip(meta["classes"], measures.per_class(logits, labels), strict=True)
    row["per_class"] = {name: accuracy for name, accuracy in accuracies if not math.isnan(accuracy)}
    row["bytes"] = (find(str(cell.folder)) / checkpoint.WEIGHTS).stat().st_size
    shape = [meta["network"], meta["method"], meta["surgery"], meta["image_size"], len(meta["classes"])]
    if json.dumps(shape) not in costs:  # equal for every seed
        costs[json.dumps(shape)] = cost(net, meta["image_size"])
    return row | costs[json.dumps(shape)]


def cost(net: torch.nn.Module, size: int) -> dict[str, float]:
    values: dict[str, float] = {"parameters": measures.parameters(net), "macs": measures.macs(net, size)}
    for batch in (1, 64):
        for name, value in measures.latency(net, size, batch).items():
            values[f"cpu_batch{batch}_{name}"] = value
    return values
