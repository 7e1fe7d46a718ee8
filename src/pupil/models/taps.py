"""Any network as a `Net`: torch.fx traces it, its graph is cut where everything passes through one tensor.

Taps are outputs of the pieces, so there are no hooks and all of it compiles as one graph.  The pieces keep the native
names of their parts: a state dict with native keys is a matter of prefixes (`native_state`).

stem       after the first convolution, its norm and its activation
maps       the last tensor of each resolution; where there is only one (ViT), after each third of the residual sums
pre        before the ReLU that ends a stage; where none does, the same as the map
last       the last map there is, so what is pooled
embedding  what the final linear layer sees
Tokens (B, N, C) and maps (B, H, W, C) are shown as (B, C, H, W).  A network without maps has the images as its stem.
"""

import torch
from torch import Tensor, fx, nn

from pupil.models.spots import choose
from pupil.models.tracing import (
    between,
    classifier,
    cuts,
    first,
    function,
    graft,
    one_line,
    place,
    relu_input,
    shapes_of,
    trace,
)
from pupil.net import Net, Stage, evaluating
from pupil.types import UserError


class Segment(nn.Module):
    """A piece of a network, between two of its tensors; in train and eval mode what the network does there."""

    def __init__(self, root: nn.Module, graphs: dict[bool, fx.Graph]) -> None:
        super().__init__()
        for graph in graphs.values():
            for node in graph.nodes:
                if node.op in ("call_module", "get_attr"):
                    graft(self, root, node.target)
        self._run = {mode: function(graph) for mode, graph in graphs.items()}

    def forward(self, x: Tensor) -> Tensor:
        return self._run[self.training](self, x)


class Part(Stage):
    """A stage cut out of a network."""

    def __init__(self, blocks: nn.Module, act: nn.Module, view: nn.Module) -> None:
        super().__init__(blocks, act=act)
        self.view = view

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pre = self.blocks(x)
        out = self.act(pre)
        return self.view(pre), self.view(out), out


class Tail(nn.Module):
    """From the last map to what the head sees: pooling, and whatever norms and layers there are."""

    def __init__(self, tail: nn.Module, view: nn.Module | None) -> None:
        super().__init__()
        self.tail, self.view = tail, view

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.tail(x)
        return embedding[:, :, None, None] if self.view is None else self.view(x), embedding


class External(Net):
    """A network that is not one of ours."""

    def __init__(self, name: str, stem: nn.Module, stages: list[Part], head: nn.Module, neck: nn.Module, pool: Tail) -> None:
        super().__init__(stem, stages, head, neck, pool)
        self.name = name
        self.native_head = ""  # the head's name in the network
        self.found: tuple[str, ...] = ()  # the taps' names in the graph: stem, stages, embedding
        self.unused: dict[str, Tensor] = {}  # what the network holds and its answer does not need


def native_state(net: Net) -> dict[str, Tensor]:
    """The state dict with the keys of the wrapped network, which loads without this package; of a plain student."""
    if not isinstance(net, External):
        return dict(net.state_dict())
    state = dict(net.unused)
    for key, value in net.state_dict().items():
        place, _, rest = key.partition(".")
        if place == "head":
            rest = f"{net.native_head}.{rest}"
        elif place in ("stages", "pool"):  # stages.0.blocks.0.KEY, pool.tail.KEY
            rest = rest.split(".", 3 if place == "stages" else 1)[-1]
        state[rest] = value
    return state


# --- from a module to a Net -----------------------------------------------------------------------------------------------


def as_net(name: str, network: nn.Module, num_classes: int, image_size: int) -> External:
    """The network cut at its taps; refuses, in one line, what cannot be cut or does not give (B, K)."""
    answers_classes(name, network, num_classes, image_size)
    for module in network.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]  # a tap must stay what it was
    native = network.state_dict()
    graphs = {mode: trace(name, network, mode) for mode in (False, True)}
    head, embedding = classifier(name, network, graphs[False], num_classes)
    shapes = shapes_of(network, graphs[False], image_size)
    also = {node.name for node in cuts(graphs[True], classifier(name, network, graphs[True], num_classes)[1])}
    nodes = {node: depth for node, depth in cuts(graphs[False], embedding).items() if node.name in also}
    stem, ends, last = choose(network, nodes, shapes)
    at = [first(graphs[False])]

    def piece(end: fx.Node) -> nn.Module:
        """From where the last piece ended; nothing where that is here."""
        start, at[0] = at[0], end
        if end is start:
            return nn.Identity()
        return Segment(network, {mode: between(graph, start.name, end.name) for mode, graph in graphs.items()})

    begin = nn.Identity() if stem is None else piece(stem.node)
    parts = []
    for spot in ends:
        before = relu_input(network, spot.node)
        smooth = before is None or before not in nodes or before is at[0]
        blocks = piece(spot.node if smooth or before is None else before)
        parts.append(Part(blocks, nn.Identity() if smooth else nn.ReLU(), spot.view))
        at[0] = spot.node
    neck = nn.Identity() if last is None else piece(last.node)
    pool = Tail(piece(embedding), None if last is None else last.view)
    net = External(name, begin, parts, network.get_submodule(head), neck, pool)
    net.native_head = head
    net.found = ("images" if stem is None else place(stem.node), *(place(s.node) for s in ends), place(embedding))
    kept = native_state(net)
    net.unused = {key: value for key, value in native.items() if key not in kept}
    verify(name, network, net, image_size)
    return net


def answers_classes(name: str, network: nn.Module, num_classes: int, image_size: int) -> None:
    try:
        with evaluating(network), torch.no_grad():
            out = network(torch.zeros(2, 3, image_size, image_size))
    except Exception as e:  # whatever the network has against these images
        raise UserError(f"{name} cannot take images of {image_size} pixels: {one_line(e)}") from None
    if not isinstance(out, Tensor) or out.shape != (2, num_classes):
        given = f"a {type(out).__name__}" if not isinstance(out, Tensor) else f"shape {tuple(out.shape)}"
        raise UserError(f"{name} must give logits (B, {num_classes}) for (B, 3, H, W) images; for two images it gave {given}")


def verify(name: str, network: nn.Module, net: External, image_size: int) -> None:
    """The pieces give what the network gives, in both modes, and no piece changes the tap before it."""
    x = torch.randn(4, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    state = {key: value.clone() for key, value in network.state_dict().items()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for mode in (True, False):
            torch.manual_seed(0)
            expected = network.train(mode)(x)
            restore(network, state)
            torch.manual_seed(0)
            f = net.train(mode).features(x)
            restore(network, state)
            if not torch.allclose(f.logits, expected, rtol=1e-4, atol=1e-5):
                raise UserError(f"{name} cannot be cut into stages: the pieces do not give what the network gives")
        carried = net.stem(x)
        for stage, tap in zip(net.stages, f.maps, strict=True):  # pyright: ignore[reportPossiblyUnboundVariable]
            _, seen, carried = stage(carried)
            if not torch.allclose(seen, tap):
                raise UserError(f"{name} changes the tensor at the end of a stage in place, so it cannot be tapped there")
        net.pools_last = f.last.shape[1] == f.embedding.shape[1] and torch.allclose(  # pyright: ignore
            f.last.mean((2, 3)),  # pyright: ignore
            f.embedding,  # pyright: ignore
            rtol=1e-3,
            atol=1e-5,
        )
    net.train()


def restore(network: nn.Module, state: dict[str, Tensor]) -> None:
    for key, value in network.state_dict().items():
        value.copy_(state[key])
