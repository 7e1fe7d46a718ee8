"""Golden vectors: reading them, and comparing by the rules that their README gives."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One npz file; what it is, is decided by its `meta` alone."""

    path: Path
    id: str
    meta: dict[str, Any]

    @property
    def method(self) -> str:
        return self.meta["method"]

    @property
    def is_model(self) -> bool:
        return self.method == "model forward"

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.path) as z:
            return {name: z[name] for name in z.files if name != "meta"}

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name].copy())

    def leaf(self, name: str) -> Tensor:
        """An input whose gradient is wanted."""
        return self.tensor(name).requires_grad_()

    def number(self, name: str, default: float = 0.0) -> float:
        return float(self.arrays[name]) if name in self else default

    def integer(self, name: str) -> int:
        return int(self.arrays[name])

    def load(self, modules: Mapping[str, nn.Module]) -> None:
        """Fills every parameter and buffer of each module from the arrays `<name>_<key>`."""
        for name, module in modules.items():
            given = {k: self.tensor(f"{name}_{k}") for k in module.state_dict() if f"{name}_{k}" in self}
            counter = {k: v for k, v in module.state_dict().items() if k == "num_batches_tracked"}
            module.load_state_dict(given | counter)


def find_cases(folder: Path) -> list[Case]:
    cases = []
    for path in sorted(folder.rglob("*.npz")):
        with np.load(path) as z:
            meta = json.loads(str(z["meta"])) if "meta" in z.files else {}
        if "method" in meta:
            cases.append(Case(path, str(path.relative_to(folder).with_suffix("")), meta))
    return cases


@cache
def listings(path: Path) -> list[dict[str, Any]]:
    """A models.json: the authors' constructors, with the keys and shapes of their checkpoints."""
    return json.loads(path.read_text()) if path.exists() else []


def gradients(leaves: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """`grad_X` of every leaf; one that the loss does not reach has a gradient of zero."""
    return {f"{prefix}grad_{n}": torch.zeros_like(x) if x.grad is None else x.grad.clone() for n, x in leaves.items()}


def module_results(modules: Mapping[str, nn.Module], prefix: str = "") -> dict[str, Tensor]:
    """The gradients of the parameters and the statistics after the call, under the names of the vectors."""
    leaves = {f"{name}_{k}": p for name, m in modules.items() for k, p in m.named_parameters()}
    buffers = {f"{prefix}{name}_{k}_after": b.clone() for name, m in modules.items() for k, b in m.named_buffers()}
    return gradients(leaves, prefix) | buffers


def compare(case: Case, got: Mapping[str, Any], informational: frozenset[str] = frozenset()) -> list[str]:
    """What is wrong, one line per output; an output that nobody looked at is wrong."""
    biggest = max(
        (np.abs(a).max(initial=0) for n, a in case.arrays.items() if "grad" in n and a.dtype.kind == "f"), default=0.0
    )
    per_output = case.meta.get("suggested_tolerance_per_output") or {}
    wrong = [f"{n}: never compared" for n in case.meta["outputs"] if n not in got and n not in informational]
    for name in case.meta["outputs"]:
        if name in got:
            tol = per_output.get(name, case.meta["suggested_tolerance"])
            floor = 0.02 * biggest if "grad" in name else 0.0
            wrong += difference(name, got[name], case.arrays[name], tol, floor)
    return wrong


def difference(name: str, ours: Any, reference: np.ndarray, tol: float, floor: float = 0.0) -> list[str]:
    """max|a - b| <= tol * max(max|b|, floor); integers, booleans and texts exactly; a line of text if not so."""
    a = ours.detach().numpy() if isinstance(ours, Tensor) else np.asarray(ours)
    if a.shape != reference.shape:
        return [f"{name}: shape {a.shape}, expected {reference.shape}"]
    if reference.dtype.kind != "f":
        return [] if a.dtype.kind == reference.dtype.kind and (a == reference).all() else [f"{name}: {a}, expected {reference}"]
    reference = reference.astype(np.float64)
    error = np.abs(a.astype(np.float64) - reference).max(initial=0)
    allowed = tol * max(np.abs(reference).max(initial=0), floor)
    return [] if error <= allowed else [f"{name}: off by {error:.3g}, allowed {allowed:.3g} (tolerance {tol:g})"]
