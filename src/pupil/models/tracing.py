"""The graph of a network: traced by torch.fx, cut between two of its tensors, made a function again."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from pupil.net import evaluating
from pupil.types import UserError

RANDOM = ("DropPath", "StochasticDepth", "DropBlock2d")  # what they do depends on the mode: called, not traced
PROBE = 128  # pixels: enough to tell the resolutions of stride 32 apart


class Tracer(fx.Tracer):
    """Traces as deep as it can: a module that cannot be traced is called."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kinds = set(type(m).__mro__) - {nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict}
        return type(m).__name__ in RANDOM or any(kind.__module__.startswith("torch.nn.modules") for kind in kinds)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        stack = self.module_stack.copy()
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:  # control flow that depends on data, or whatever else its code does
            self.module_stack = stack
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


def trace(name: str, network: nn.Module, training: bool) -> fx.Graph:
    rest = list(inspect.signature(network.forward).parameters.values())[1:]
    defaults = {p.name: p.default for p in rest if p.default is not p.empty}
    try:
        return Tracer(autowrap_functions=opaque_functions()).trace(network.train(training), defaults)
    except Exception as e:
        raise UserError(f"{name} cannot be traced by torch.fx, which finds its taps: {one_line(e)}") from None


def opaque_functions() -> tuple[Callable[..., Any], ...]:
    """What timm says torch.fx must not look into, where timm is in use."""
    timm = sys.modules.get("timm.layers")
    return () if timm is None else tuple(f for f in timm.get_notrace_functions() if callable(f))


def classifier(name: str, network: nn.Module, graph: fx.Graph, num_classes: int) -> tuple[str, fx.Node]:
    """The name of the final linear layer, and the node that it sees."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    node = output.args[0]
    while isinstance(node, fx.Node) and node.op == "call_module":
        module = network.get_submodule(str(node.target))
        if isinstance(module, nn.Linear) and isinstance(node.args[0], fx.Node):
            return str(node.target), node.args[0]
        if not isinstance(module, nn.Identity):
            break
        node = node.args[0]
    ends = "several outputs" if not isinstance(node, fx.Node) else place(node)
    raise UserError(
        f"{name} must end in one linear layer, its classifier of {num_classes} classes; it ends in {ends}"
        f"{by_convolution(network)}"
    )


def by_convolution(network: nn.Module) -> str:
    """What to do about a classifier that is a 1x1 convolution before the pool; nothing where the last layer is no such."""
    weighty = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if not weighty or not isinstance(weighty[-1], nn.Conv2d):
        return ""
    return (
        f", after a convolution of {weighty[-1].out_channels} channels; wrap it in a function of your own that pools,"
        f" flattens and ends in nn.Linear({weighty[-1].in_channels}, classes) (see networks/README.md)"
    )


def cuts(graph: fx.Graph, end: fx.Node) -> dict[fx.Node, int]:
    """The nodes that every path from the images to `end` goes through, in order, with how many modules a cut would split."""
    source = first(graph)
    depends = {source}
    for node in graph.nodes:
        if any(n in depends for n in node.all_input_nodes):
            depends.add(node)
    needed = ancestors(end, source) | {source}
    path = [node for node in graph.nodes if node in needed and node in depends]
    order = {node: i for i, node in enumerate(path)}
    found, reach = {}, 0
    for i, node in enumerate(path):
        if reach <= i and i:
            found[node] = len(modules_of(node) & modules_of(path[min(i + 1, len(path) - 1)]))
        reach = max([reach, *(order[user] for user in node.users if user in order)])
    return found


def modules_of(node: fx.Node) -> set[str]:
    return set(node.meta.get("nn_module_stack", ()))


def ancestors(end: fx.Node, start: fx.Node) -> set[fx.Node]:
    """`end` and all that it is made of, back to `start`."""
    needed, stack = set(), [end]
    while stack:
        node = stack.pop()
        if node is not start and node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    return needed


def between(graph: fx.Graph, start: str, end: str) -> fx.Graph:
    """What makes the node `end` out of the node `start`."""
    by_name = {node.name: node for node in graph.nodes}
    piece = fx.Graph()
    copies = {by_name[start]: piece.placeholder("x")}
    needed = ancestors(by_name[end], by_name[start])
    for node in graph.nodes:
        if node in needed:
            copies[node] = piece.node_copy(node, lambda n: copies[n])
    piece.output(copies[by_name[end]])
    return piece


def function(graph: fx.Graph) -> Callable[[nn.Module, Tensor], Tensor]:
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(code.src, scope)
    return scope["forward"]


def graft(to: nn.Module, root: nn.Module, target: str) -> None:
    """Gives `to` the part of `root` of that name; it is shared, not copied."""
    *path, leaf = target.split(".")
    for name in path:
        if name not in to._modules:
            to.add_module(name, nn.Module())
        to, root = to.get_submodule(name), root.get_submodule(name)
    value = getattr(root, leaf)
    if isinstance(value, nn.Module):
        to.add_module(leaf, value)
    elif isinstance(value, nn.Parameter):
        to.register_parameter(leaf, value)
    elif leaf not in to._buffers:
        to.register_buffer(leaf, value, leaf in root._buffers and leaf not in root._non_persistent_buffers_set)


def shapes_of(network: nn.Module, graph: fx.Graph, image_size: int) -> dict[str, tuple[int, ...]]:
    """Of two images; a size that tells the resolutions apart, where the network takes it."""
    shapes: dict[str, tuple[int, ...]] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                shapes[n.name] = tuple(value.shape)
            return value

    with evaluating(network), torch.no_grad():
        for size in (max(PROBE, image_size), image_size):
            try:
                Watch(fx.GraphModule(network, graph)).run(torch.zeros(2, 3, size, size))
            except Exception:  # made for one size; that it takes `image_size` is known
                shapes.clear()
            else:
                break
    return shapes


def first(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op == "placeholder")


def place(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def is_finish(network: nn.Module, node: fx.Node) -> bool:
    """A norm or an activation."""
    if node.op != "call_module":
        return getattr(node.target, "__name__", str(node.target)) in (
            "relu",
            "gelu",
            "silu",
            "hardswish",
            "leaky_relu",
            "permute",
        )
    kind = type(network.get_submodule(str(node.target)))
    return "Norm" in kind.__name__ or kind.__module__ == "torch.nn.modules.activation"


def has_weights(network: nn.Module, node: fx.Node) -> bool:
    return any(
        n.op == "get_attr" or (n.op == "call_module" and any(True for _ in network.get_submodule(str(n.target)).parameters()))
        for n in (node, *node.all_input_nodes)
    )


def relu_input(network: nn.Module, node: fx.Node) -> fx.Node | None:
    """What a plain ReLU sees; None if the node is none."""
    plain = (
        type(network.get_submodule(str(node.target))) is nn.ReLU
        if node.op == "call_module"
        else node.target in (torch.relu, nn.functional.relu, "relu")
    )
    return node.all_input_nodes[0] if plain else None


def one_line(e: Exception) -> str:
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
