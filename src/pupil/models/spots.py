"""Where a traced network is cut: the tensors that can be seen as maps, and which of them are stem, stages and last map."""

import math
from itertools import groupby
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from pupil.models.tracing import has_weights, is_finish


class View(nn.Module):
    """Tokens or a (B, H, W, C) map as (B, C, H, W)."""

    def __init__(self, prefix: int | None) -> None:
        super().__init__()
        self.prefix = prefix  # tokens before those of the image (class, registers); None: there are no tokens

    def forward(self, x: Tensor) -> Tensor:
        if self.prefix is None:
            return x.permute(0, 3, 1, 2)
        x = x[:, self.prefix :]
        return x.transpose(1, 2).unflatten(2, (math.isqrt(x.shape[1]), -1))


class Spot(NamedTuple):
    """A tensor that everything passes through and that can be seen as a map."""

    node: fx.Node  # of the graph in eval mode
    side: int
    view: nn.Module


def choose(
    network: nn.Module, nodes: dict[fx.Node, int], shapes: dict[str, Any]
) -> tuple[Spot | None, list[Spot], Spot | None]:
    """The stem, the ends of the stages and the last map; no stem and no last map where there is no stage."""
    spots = find_spots(network, nodes, shapes)
    if not spots:
        return None, [], None
    n = int(isinstance(spots[0].view, nn.Identity))  # the stem is a map as it is
    while 0 < n < len(spots) and is_finish(network, spots[n].node) and shapes[spots[n].node.name] == shapes[spots[0].node.name]:
        n += 1
    stem, rest = spots[n - 1] if n else None, spots[n:]
    ends = [best_end(list(group), nodes) for _, group in groupby(rest, lambda spot: spot.side)]
    sums = [s for s in rest if "add" in s.node.name]
    if len(ends) == 1 and len(sums) >= 3:
        ends = [sums[math.ceil(len(sums) * third / 3) - 1] for third in (1, 2, 3)]
    return (stem, ends, rest[-1]) if ends else (None, spots[-1:], spots[-1])


def best_end(spots: list[Spot], nodes: dict[fx.Node, int]) -> Spot:
    """The last that splits fewest modules, in the deeper half: a block that only begins here belongs to the next stage."""
    order = {node: i for i, node in enumerate(spots[0].node.graph.nodes)}
    half = (order[spots[0].node] + order[spots[-1].node]) / 2
    return min((s for s in reversed(spots) if order[s.node] >= half), key=lambda spot: nodes[spot.node])


def find_spots(network: nn.Module, nodes: dict[fx.Node, int], shapes: dict[str, Any]) -> list[Spot]:
    """What can be seen as a map, from the first layer with weights to the pooling; sides never grow."""
    spots: list[Spot] = []
    weighty, grid = False, 0
    for node in next(iter(nodes)).graph.nodes:
        shape = shapes.get(node.name)
        weighty = weighty or has_weights(network, node)
        if not weighty or shape is None or shape[:1] != (2,):
            continue
        grid = shape[2] if len(shape) == 4 and shape[2] == shape[3] else grid
        if node not in nodes:
            continue
        side, view = 0, None
        if len(shape) == 4 and shape[2] == shape[3]:
            side, view = shape[2], nn.Identity()
        elif len(shape) == 4 and shape[1] == shape[2]:
            side, view = shape[1], View(None)
        elif len(shape) == 3 and grid and 0 <= shape[1] - grid**2 < 8:
            side, view = grid, View(shape[1] - grid**2)
        if view is None:
            continue
        if side == 1 or (spots and side > spots[-1].side):
            break
        spots.append(Spot(node, side, view))
    return spots
