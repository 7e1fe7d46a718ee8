"""How alike two classifiers are: the cosine of the weights of each class, between student, teacher and SH-KD teacher.

The question of Ben-Baruch et al., 2022, arXiv:2201.06945: classifiers of equal width that were trained apart need not
agree, one that was borrowed does.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from pupil import checkpoint, figures
from pupil.assemble import find
from pupil.rows import Cell


def draw(cells: Sequence[Cell], folder: Path) -> None:
    """head_similarity.csv and .png; nothing where no two classifiers are of the same classes and width."""
    found, classes = compare(cells)
    if not found:
        return
    with open(folder / "head_similarity.csv", "w", newline="") as f:
        rows = [[name, *(f"{x:.4f}" for x in values.tolist())] for name, values in found.items()]
        csv.writer(f).writerows([["classifiers", *classes], *rows])
    figures.similarity(found, classes, folder / "head_similarity.png")


def compare(cells: Sequence[Cell]) -> tuple[dict[str, Tensor], list[str]]:
    """pair -> (K,) cosines, the mean over seeds; and the names of the K classes, those of the students."""
    classes = checkpoint.read_meta(find(str(cells[-1].folder)))["classes"]
    heads = {cell.folder: head for cell in cells if (head := classifier(cell.folder, classes)) is not None}
    found: dict[str, list[Tensor]] = {}
    for name, a, b in pairs(cells):
        if a in heads and b in heads and heads[a].shape == heads[b].shape:
            found.setdefault(name, []).append(F.cosine_similarity(heads[a], heads[b]))
    return {name: torch.stack(values).mean(0) for name, values in found.items()}, classes


def classifier(folder: Path, classes: Sequence[str]) -> Tensor | None:
    """(K, D) weights of the own classifier; None if it knows other classes or is not linear."""
    here = find(str(folder))
    if checkpoint.read_meta(here)["classes"] != classes:
        return None
    weight = load_file(here / checkpoint.WEIGHTS).get("head.weight")
    return None if weight is None else weight.double()


def pairs(cells: Sequence[Cell]) -> Iterator[tuple[str, Path, Path]]:
    """What is compared: SH-KD teacher and teacher; each teacher and the student alone; each teacher and its students."""
    families = {cell.folder: cell.family for cell in cells}
    for cell in cells:
        if cell.teacher is None:
            yield from ((f"{cell.family} and {b.family}", cell.folder, b.folder) for b in cells if b.family == cell.baseline)
    taught = [cell for cell in cells if cell.teacher is not None]
    for cell in {(c.baseline, c.teacher, c.seed): c for c in taught}.values():
        for alone in cells:
            if cell.teacher and (alone.family, alone.seed) == (cell.baseline, cell.seed):
                yield f"{alone.family} and {families[cell.teacher]}", alone.folder, cell.teacher
    for cell in taught:
        if cell.teacher:
            yield f"{cell.family}, with its teacher", cell.folder, cell.teacher
