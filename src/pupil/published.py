"""Checkpoints of published code: their layouts, and their tensors matched with a network of the table.

The layouts (where the weights lie, which prefixes their keys have) are those of RepDistiller, SimKD, HeadSharingKD,
spot-adaptive KD, CSKD, REFILLED and mdistiller; any other file may hold a plain state dict, as torchvision's do.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pupil.models import NETWORKS, build, published_key
from pupil.types import UserError
from pupil.untrusted import clip, read_untrusted

LAYOUTS = (  # name, where the weights are, what must be beside them; the first that fits
    ("SimKD", "model", {"proj"}),
    ("spot-adaptive", "model", {"policy"}),
    ("spot-adaptive", "model", {"acc"}),
    ("RepDistiller", "model", {"opt"}),
    ("RepDistiller", "model", {"accuracy"}),
    ("RepDistiller or SimKD", "model", {"best_acc"}),
    ("mdistiller or RepDistiller", "model", set()),
    ("REFILLED", "state_dict", {"validating_accuracy"}),
    ("CSKD", "state_dict", {"err"}),
    ("dict with state_dict", "state_dict", set()),
)
COUNTER = "num_batches_tracked"


class Published(NamedTuple):
    """What a file holds."""

    layout: str
    state: dict[str, Tensor]  # of the network, under the authors' keys
    beside: dict[str, dict[str, Tensor]]  # other modules' tensors: `proj`, `t_head`, `teacher`, ...
    others: list[str]  # what else is in the file: optimizer, epoch, ...
    named: str | None  # the architecture, if the file says so


class Fit(NamedTuple):
    """A state dict held against a network of the table."""

    network: str
    classes: int
    state: dict[str, Tensor]  # the file's tensors under our keys
    counters: int  # batch norms whose counter the file lacks; they start at 0
    wrong: list[str]  # missing, left over or of another shape: one text each


def read(path: Path) -> Published:
    """The network in a .pth, .pt, .tar, .model or .safetensors file."""
    raw, named = read_untrusted(path)
    return unwrap(path, raw, named)


def unwrap(path: Path, raw: Mapping[Any, Any], named: str | None) -> Published:
    """Takes layouts and prefixes off."""
    fits = (row for row in LAYOUTS if isinstance(raw.get(row[1]), Mapping) and row[2] <= raw.keys())
    layout, where, _ = next(fits, ("plain state dict", None, None))
    state = tensors(path, raw if where is None else raw[where])
    beside, others = {}, []
    for key, value in raw.items() if where is not None else ():
        if isinstance(value, Mapping) and value and all(isinstance(v, Tensor) for v in value.values()):
            beside |= {} if key == where else {clip(key): tensors(path, value)}
        else:
            others.append(clip(key))
    for prefix, theirs in (("student.", "mdistiller"), ("model_s.", "HeadSharingKD")):
        if any(key.startswith(prefix) for key in state):
            layout = theirs
            for key in [key for key in state if not key.startswith(prefix)]:
                module, _, rest = key.partition(".")
                beside.setdefault(clip(module), {})[rest] = state.pop(key)
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return Published(layout, state, beside, others, named)


def tensors(path: Path, found: Mapping[Any, Any]) -> dict[str, Tensor]:
    """A state dict, without the prefixes of DataParallel and torch.compile."""
    state = dict(found)
    if not state:
        raise UserError(f"{path} holds no tensors")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: expected named tensors, got {clip(type(value).__name__)} at {clip(key)}")
        plain = value.layout is torch.strided and not value.is_quantized and value.device.type == "cpu"
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{path}: {clip(key)} is not a plain tensor with numbers of its own; save a plain state_dict()")
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def fit(state: Mapping[str, Tensor], network: str) -> Fit:
    """What fits and what does not; the number of classes is the head's rows."""
    rename = published_key(network)
    ours: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    wrong: list[str] = []
    for key, value in state.items():
        target = rename(key)
        wrong += [f"{clip(key)} and {clip(origin[target])} are the same tensor"] if target in origin else []
        ours[target], origin[target] = value, key
    head = ours.get("head.weight")
    if head is not None and head.ndim == 4 and head.shape[2:] == (1, 1):  # mdistiller's MobileNetV2: a 1x1 convolution
        head = ours["head.weight"] = head.flatten(1)
    classes = head.shape[0] if head is not None and head.ndim == 2 and head.numel() else 100
    expected = {key: (classes, *shape[1:]) if key.startswith("head.") else shape for key, shape in shapes(network).items()}
    filled, counters = {}, 0
    wrong += [f"{clip(origin[key])} is left over" for key in ours if key not in expected]
    for key, shape in expected.items():
        if key in ours and tuple(ours[key].shape) != shape:
            wrong.append(f"{clip(origin[key])} is {tuple(ours[key].shape)}, expected {shape}")
        elif key in ours:
            filled[key] = ours[key]
        elif key.endswith(COUNTER):
            filled[key], counters = torch.zeros((), dtype=torch.int64), counters + 1
        else:
            wrong.append(f"{key} is missing")
    return Fit(network, classes, filled, counters, wrong)


def weights(path: Path, found: Fit) -> dict[str, Tensor]:
    """A state dict of our own: float32, no memory shared with the file's."""
    if sick := [key for key, value in found.state.items() if not value.isfinite().all()]:
        raise UserError(f"{path}: {len(sick)} tensors hold nan or infinity, first {sick[0]} (our name): it cannot teach")
    kinds = {key: torch.int64 if key.endswith(COUNTER) else torch.float32 for key in found.state}
    return {key: value.detach().to(kinds[key], copy=True).contiguous() for key, value in found.state.items()}


@cache
def shapes(network: str) -> dict[str, tuple[int, ...]]:
    """Of the network's tensors, for one class."""
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in build(network, 1).state_dict().items()}


def nearest(state: Mapping[str, Tensor]) -> list[Fit]:
    """All networks whose tensors these are; else the one that differs least."""
    fits = sorted((fit(state, network) for network in NETWORKS), key=lambda f: len(f.wrong))
    return [f for f in fits if not f.wrong] or fits[:1]
