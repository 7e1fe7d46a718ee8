"""Checker of DOT."""

import re

import torch

from pupil.dot import DOT
from tests.reference.blocks import Row, Values
from tests.reference.golden import Case


def check_dot(case: Case) -> Values:
    count = sum(bool(re.fullmatch(r"param_\d+", name)) for name in case.arrays)
    parameters = [torch.nn.Parameter(case.tensor(f"param_{i}")) for i in range(count)]
    group = {"params": parameters, "weight_decay": case.number("weight_decay")}
    dot = DOT([group], case.number("lr"), case.number("base_momentum"), case.number("delta"))
    steps = {int(m[1]) for m in (re.match(r"step(\d+)_", name) for name in case.meta["inputs"]) if m}
    values: Values = {}
    for n in sorted(steps):
        task, teacher = (
            [case.tensor(f"step{n}_{kind}_grad_{i}") if f"step{n}_{kind}_grad_{i}" in case else None for i in range(count)]
            for kind in ("task", "kd")
        )
        dot.step(task, teacher)
        for i, p in enumerate(parameters):
            values[f"step{n}_param_{i}"] = p.detach().clone()
            for kind, buffer in (("task", "task"), ("kd", "teacher")):
                if buffer in dot.state[p]:
                    values[f"step{n}_{kind}_buffer_{i}"] = dot.state[p][buffer].clone()
    return values


ROWS = {"DOT optimiser": Row((), check_dot)}
