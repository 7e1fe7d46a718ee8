"""What checkers of golden vectors are made of: networks and features of which one tensor is known."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pupil.methods.base import Setup
from pupil.net import Net, Stage
from pupil.types import Batch, Features, Terms
from tests.reference.golden import Case

Values = dict[str, Any]


class Row(NamedTuple):
    names: tuple[str, ...]  # the rows of METHODS that it exercises
    check: Callable[[Case], Values] | None  # None: not written yet
    informational: frozenset[str] = frozenset()  # outputs that say nothing about our code


def given(head: nn.Linear | None = None) -> Net:
    """A network whose only map is its input: (B, C, H, W) -> itself, pooled, head."""
    return Net(nn.Identity(), [Stage(nn.Identity(), act=nn.Identity())], nn.Linear(1, 1) if head is None else head)


def said(f: Tensor, logits: Tensor | None = None) -> Features:
    """The features of a network of which one tensor is known: a map (B, C, H, W) or an embedding (B, D)."""
    map_ = f if f.dim() == 4 else f[:, :, None, None]
    return Features(map_, (map_,), (map_,), map_, map_.mean((2, 3)), torch.zeros(len(f), 2) if logits is None else logits)


def of_logits(z: Tensor) -> Features:
    return said(torch.zeros(len(z), 1), z)


def batch_of(images: Tensor, labels: Tensor | None = None, ids: Tensor | None = None) -> Batch:
    zeros = torch.zeros(len(images), dtype=torch.int64)
    return Batch(images, zeros if labels is None else labels, zeros if ids is None else ids)


def setup_of(s: Features, t: Features, student: Net | None = None, teacher: Net | None = None, samples: int = 2) -> Setup:
    student, teacher = given() if student is None else student, given() if teacher is None else teacher
    return Setup(student, teacher.requires_grad_(False).eval(), s, t, torch.arange(samples) % 2)


def total(terms: Terms) -> Tensor:
    return torch.stack([term.weight * term.raw for term in terms.values()]).sum()


def linear(case: Case, name: str) -> nn.Linear:
    k, d = case.arrays[f"{name}_weight"].shape
    head = nn.Linear(d, k)
    case.load({name: head})
    return head
