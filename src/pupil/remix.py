"""`python -m pupil import FOLDER --mix M`: a trained student answers with its own classifier, the teacher's, or both.

For the students of thkd, kdeth and crdth, whatever `mix` they were trained with; of a student that was saved with its own
classifier alone, --teacher names the teacher's folder.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pupil import checkpoint
from pupil.assemble import find
from pupil.config import HOME
from pupil.methods import METHODS
from pupil.methods.heads import TeachersHead
from pupil.net import FrozenLinear
from pupil.places import empty_or_new, fresh
from pupil.types import UserError


def remix(folder: Path, mix: float, teacher: str | None, out: Path | None) -> None:
    """Writes the student of `folder` as a model folder of another mix; 0: its own classifier alone."""
    target = fresh("import") / "model" if out is None else out
    empty_or_new(target)
    net, meta = checkpoint.load(folder)
    method, state = meta["method"], net.state_dict()
    if method is None or not issubclass(METHODS[method], TeachersHead):
        able = ", ".join(name for name, m in METHODS.items() if issubclass(m, TeachersHead))
        who = "a network trained alone" if method is None else f"a student of {method}"
        raise UserError(f"--mix is for the students of {able}, {folder} holds {who}: leave it out")
    if not 0 <= mix <= 1:
        raise UserError(f"--mix: expected a number from 0 (own classifier) to 1 (the teacher's), got {mix:g}")
    theirs = {key: state.pop(key) for key in list(state) if key.startswith("teacher_head.")}
    if teacher is not None and (theirs or not mix):
        raise UserError(
            f"--teacher has no effect: {'the student has that classifier' if theirs else 'the mix is 0'}; leave it out"
        )
    if teacher is not None:
        theirs = lent(folder, meta["teacher"] or {}, find(teacher))
    if mix and not theirs:
        raise UserError(f"{folder} has its own classifier alone; give --teacher and the folder of its teacher")
    classes, width = state["head.weight"].shape
    surgery = {"mix": mix, "width": width, "classes": classes} if mix else {}
    known = {key: value for key, value in meta.items() if key not in ("metrics", "sha256")}  # the metrics are of the old mix
    checkpoint.save(target, state | theirs if mix else state, {**known, "surgery": surgery, "remixed_from": meta["sha256"]})
    inside = target.resolve().is_relative_to(HOME.resolve())
    print(f"{target}: {meta['network']} by {method}, share of the teacher's classifier {mix:g}")
    print(f"use it: student.checkpoint={os.path.relpath(target, HOME) if inside else target.resolve()}")


def lent(folder: Path, ancestor: Mapping[str, Any], teacher: Path) -> dict[str, Tensor]:
    """The classifier of the very teacher, as the student's method had it."""
    net, theirs = checkpoint.load(teacher)
    if theirs["sha256"] != ancestor.get("sha256"):
        who = f"which was a {ancestor['network']} of another training" if ancestor else "of which nothing is known"
        raise UserError(f"--teacher: {teacher} is not the teacher of {folder}, {who}")
    head = FrozenLinear.of(net.head, ancestor.get("cut", {}).get("kept"))
    return {f"teacher_head.{key}": value for key, value in head.state_dict().items()}
