"""What a training changes, beside its place: tensors of modules, attributes that they remember, an optimiser's buffers."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def tensors(module: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, those included that no checkpoint holds."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def remembered(module: Any) -> list[tuple[str, nn.Module, str]]:
    """Its key, module and name of each attribute that is neither parameter nor buffer and changes in training."""
    return [
        (f"{path}.{name}".lstrip("."), part, name)
        for path, part in module.named_modules()
        for name in getattr(part, "remembers", ())
    ]


def moved(device: torch.device, value: Any) -> Any:
    """Every tensor in nested dicts and lists to the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: moved(device, v) for key, v in value.items()}
    return [moved(device, v) for v in value] if isinstance(value, list) else value


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """As `load_state_dict`, with every buffer laid out in memory as its parameter is."""
    optimizer.load_state_dict(dict(state))
    optimizer.__dict__["_opt_called"] = True  # else its schedule warns that it has not stepped yet
    for p, buffers in optimizer.state.items():
        for name, value in buffers.items():
            if isinstance(value, Tensor) and value.shape == p.shape:
                buffers[name] = torch.empty_like(p).copy_(value)
