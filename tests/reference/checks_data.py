"""Checker of CSKD's choice of classes."""

import torch

from pupil.data import Data
from pupil.data.classes import class_sets
from tests.reference.blocks import Row, Values
from tests.reference.golden import Case


def check_labels(case: Case) -> Values:
    """table_<data set>_<classes of the teacher>_<of the student>: the true class of each label."""
    rows = zip(*(case.arrays[key] for key in ("datasets", "teacher_classes", "student_classes")), strict=True)
    return {
        f"table_{name}_{of}_{n}": torch.tensor(class_sets(Data(classes=int(n)), tuple(map(str, range(int(of))))).student)
        for name, of, n in rows
    }


ROWS = {"label mapping": Row((), check_labels)}
