"""Batch norms of a frozen network worked into the convolutions before them: the same function, less work.

Where a batch norm follows a convolution is read off the graph that torch.fx traces, in eval mode.  Folded is a pair where the
norm alone sees what the convolution gives, so every tap stays what it was; the norm becomes the identity.
"""

import torch
from torch import Tensor, fx, nn

from pupil.models.tracing import Tracer
from pupil.net import Net, evaluating

CONVOLUTIONS, NORMS = (nn.Conv1d, nn.Conv2d, nn.Conv3d), (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Taps(nn.Module):
    """A network whose forward is its features: what torch.fx traces."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[object, ...]:
        return tuple(self.net.features(x))


def fold(net: Net) -> int:
    """Folds what can be folded, in place; gives how many batch norms.  A network that torch.fx cannot trace stays as it is."""
    with evaluating(net):
        try:
            pairs = adjacent(net)
        except Exception:  # its code depends on the data, or whatever else torch.fx does not follow
            return 0
    for conv, norm in pairs:
        merge(net, conv, norm)
    return len(pairs)


def adjacent(net: Net) -> list[tuple[str, str]]:
    """(convolution, batch norm) by name, each called once, where nothing but the norm sees what the convolution gives."""
    root = Taps(net)
    calls: dict[object, list[fx.Node]] = {}
    for node in Tracer().trace(root).nodes:
        if node.op in ("call_module", "get_attr"):
            calls.setdefault(root.get_submodule(node.target) if node.op == "call_module" else node.target, []).append(node)
    read = {name.rpartition(".")[0] for name in calls if isinstance(name, str)}  # modules whose weights are read from outside
    pairs = []
    for norm, nodes in calls.items():
        before = nodes[0].args[0] if nodes[0].args else None
        if not (isinstance(norm, NORMS) and isinstance(before, fx.Node) and before.op == "call_module"):
            continue
        conv, names = root.get_submodule(str(before.target)), (str(before.target), str(nodes[0].target))
        sure = type(conv) in CONVOLUTIONS and len(calls[conv]) == len(nodes) == len(before.users) == 1
        if sure and norm.track_running_stats and not read & set(names) and not hooked(conv) and not hooked(norm):
            pairs.append((names[0].removeprefix("net."), names[1].removeprefix("net.")))
    return pairs


def hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


@torch.no_grad()
def merge(net: Net, conv_name: str, norm_name: str) -> None:
    conv, norm = net.get_submodule(conv_name), net.get_submodule(norm_name)
    assert isinstance(conv, CONVOLUTIONS)
    assert isinstance(norm, NORMS)
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    scale = (var.double() + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight.double())
    shift = -mean.double() * scale if norm.bias is None else norm.bias.double() - mean.double() * scale
    if conv.bias is not None:
        shift = shift + conv.bias.double() * scale
    weight = conv.weight.double() * scale.view(-1, *[1] * (conv.weight.dim() - 1))
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)
    net.set_submodule(norm_name, nn.Identity())
