"""Which classes: those of the students, those of the teachers, and the label that each one gets."""

import math
from difflib import get_close_matches
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pupil.data.base import Data
from pupil.types import UserError


class ClassSets(NamedTuple):
    """The source's index of each class, in the order of the labels."""

    student: list[int]
    teacher: list[int]

    @property
    def apart(self) -> bool:
        return self.student != self.teacher

    @property
    def union(self) -> list[int]:
        """The students' classes first, then the teachers' other ones."""
        return list(dict.fromkeys(self.student + self.teacher))


class Labelling(NamedTuple):
    """How the labels of a draw become those of a network; positions are those of `ClassSets.union`."""

    labels: Tensor  # (U,) int64, the network's label of each class; -1: left out
    names: list[str]  # of each label


def class_sets(config: Data, names: tuple[str, ...]) -> ClassSets:
    """What `classes`, `teacher_classes` and `overlap` ask for; `names` are the source's."""
    if config.overlap is not None:
        return refilled_classes(config.overlap, len(names))
    student = list(range(len(names))) if config.classes is None else class_indices("data.classes", config.classes, names)
    if config.teacher_classes is None:
        return ClassSets(student, student)
    if config.teacher_classes == "all":
        return ClassSets(student, list(range(len(names))))
    assert not isinstance(config.teacher_classes, str), "refused by `check`"
    return ClassSets(student, class_indices("data.teacher_classes", config.teacher_classes, names))


def class_indices(key: str, given: int | tuple[int | str, ...], names: tuple[str, ...]) -> list[int]:
    """The source's index of each class, in the order given."""
    if isinstance(given, int):
        return cskd_classes(key, given, len(names))
    chosen = [class_index(key, name, names) for name in given]
    twice = [names[k] for k in dict.fromkeys(chosen) if chosen.count(k) > 1]
    if twice:
        raise UserError(f"{key} names class {twice[0]!r} twice; each may be there once")
    if len(chosen) < 2:
        raise UserError(f"{key} is {list(given)}: 2 classes or more are needed")
    return chosen


def class_index(key: str, given: int | str, names: tuple[str, ...]) -> int:
    if isinstance(given, str):
        if given in names:
            return names.index(given)
        near = get_close_matches(given, names, 1)
        hint = (
            f"did you mean {near[0]!r}?"
            if near
            else f"the classes are {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
        )
        raise UserError(f"{key}: there is no class {given!r}; {hint}")
    if not 0 <= given < len(names):
        raise UserError(f"{key}: class {given} of {len(names)}; indices are 0 to {len(names) - 1}")
    return given


def cskd_classes(key: str, n: int, of: int) -> list[int]:
    """The first n of the permutation of CSKD (Wang, Rhodes, Feng, ACCV 2022), whose seed is always 0."""
    if not 2 <= n <= of:
        raise UserError(f"{key} is {n}: a number of classes is from 2 to {of}; for class {n} alone write a list")
    return np.random.default_rng(0).permutation(of)[:n].tolist()


def refilled_classes(overlap: float, of: int) -> ClassSets:
    """Teachers: the first half of the classes.  Students: the second half, whose first floor(overlap * n) give way to
    the teachers' first ones.

    REFILLED (Ye, Lu, Zhan, CVPR 2020) reads both label sets from files that were not released; this rule is our own.
    """
    if of < 4:
        raise UserError(
            f"data.overlap is {overlap:g}: halves of {of} classes are too small, 2 in each are needed; leave it out"
        )
    teacher, second = list(range(of // 2)), list(range(of // 2, of))
    shared = math.floor(round(overlap * len(second), 9))  # 0.29 of 100 are 29, not 28
    if shared > len(teacher):
        raise UserError(
            f"data.overlap is {overlap:g}: {shared} shared classes, the teachers' half of {of} has {len(teacher)}; "
            f"{math.floor(len(teacher) / len(second) * 100) / 100:g} is the most"
        )
    return ClassSets(teacher[:shared] + second[shared:], teacher)


def labelling(chosen: list[int], sets: ClassSets, names: tuple[str, ...], relabel: str = "right") -> Labelling:
    """`chosen`: the classes of one network; `names`: the source's."""
    labels = in_place_labels(chosen) if relabel == "cskd" else list(range(len(chosen)))
    if len(set(labels)) < 2:
        raise UserError(
            f"data.relabel=cskd gives the classes {', '.join(names[k] for k in chosen)} one and the same label;"
            " choose others with data.classes, or data.relabel=right"
        )
    members = [[names[k] for k, own in zip(chosen, labels, strict=True) if own == label] for label in range(len(chosen))]
    table = torch.full((len(sets.union),), -1)
    table[[sets.union.index(k) for k in chosen]] = torch.tensor(labels)
    return Labelling(table, [" + ".join(merged) or f"(no class, label {label})" for label, merged in enumerate(members)])


def in_place_labels(chosen: list[int]) -> list[int]:
    """The labels that CSKD's code gives to CIFAR and CUB: class after class is renumbered in place.

    A new label that equals the number of a class still to come is renumbered with it: both end as one class, and the
    label between is never used.
    """
    labels = list(chosen)
    for new, old in enumerate(chosen):
        labels = [new if label == old else label for label in labels]
    return labels
