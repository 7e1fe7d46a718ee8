"""DOT: an optimiser with one momentum buffer for the task's gradient and one for the teacher's.

Paper: Zhao et al., ICCV 2023, arXiv:2307.08436.  SGD where v_task = (m - delta) v_task + g_task + wd * p,
v_kd = (m + delta) v_kd + g_kd and p -= lr * (v_task + v_kd): what the teacher says is remembered longer.
A parameter that only one of them reaches is trained with momentum m; where that is the teacher, weight decay begins
with its second step.  Defaults: the authors' for CIFAR and Tiny-ImageNet, delta 0.075 (ImageNet: 0.09).
The task's terms of a loss are those whose names begin with `ce`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pupil.distributed import average
from pupil.types import Term, Terms

Gradients = Sequence[Tensor | None]  # one per parameter, in the order of the groups


class DOT(torch.optim.Optimizer):
    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, momentum: float = 0.9, delta: float = 0.075) -> None:
        """`groups`: dicts with params, and perhaps lr and weight_decay of their own."""
        super().__init__(groups, {"lr": lr, "momentum": momentum, "delta": delta, "weight_decay": 0.0})

    def step(self, task: Gradients, teacher: Gradients) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Two gradients of every parameter, each None where the loss does not reach it."""
        at = 0
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, task[at], teacher[at], group)
                at += 1

    @torch.no_grad()
    def update(self, p: Tensor, task: Tensor | None, teacher: Tensor | None, group: dict[str, Any]) -> None:
        state, m, wd = self.state[p], group["momentum"], group["weight_decay"]
        delta = group["delta"] if task is not None and teacher is not None else 0.0
        moves = []
        if task is not None:
            moves.append(("task", task.add(p, alpha=wd), m - delta))
        if teacher is not None:
            decays = task is None and "teacher" in state
            moves.append(("teacher", teacher.add(p, alpha=wd) if decays else teacher, m + delta))
        for name, g, momentum in moves:
            state[name] = state[name].mul_(momentum).add_(g) if name in state else g.clone()
            p.sub_(state[name], alpha=group["lr"])

    def descend(self, terms: Terms) -> None:
        """One step down both losses."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        task, teacher = split(terms)
        if not task or not teacher:
            g = gradients([*task, *teacher], parameters)
            none = [None] * len(parameters)
            self.step(g if task else none, g if teacher else none)
        else:
            first = gradients(task, parameters, keep=True)
            self.step(first, gradients(teacher, parameters))


def split(terms: Terms) -> tuple[list[Term], list[Term]]:
    """The task's terms and the teacher's."""
    return (
        [term for name, term in terms.items() if name.startswith("ce")],
        [term for name, term in terms.items() if not name.startswith("ce")],
    )


def gradients(terms: list[Term], parameters: list[Tensor], keep: bool = False) -> Gradients:
    total = torch.stack([term.weight * term.raw for term in terms]).sum()
    return average(torch.autograd.grad(total, parameters, retain_graph=keep, allow_unused=True))
