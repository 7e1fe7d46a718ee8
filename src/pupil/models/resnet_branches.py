"""CIFAR ResNets with three copies of the last stage: online distillation with diverse peers, Chen et al., AAAI 2020,
arXiv:1912.00350, as spot-adaptive KD ships them.

The last branch leads: it is the network of `forward` and `features`, and what is deployed.  The other two, the peers,
answer in `branches` alone, beside the same answers mixed by attention among the peers, and so get gradients from a
method that uses them and from no other.  Depth 6n+2 with basic blocks, 9n+2 with bottlenecks; initialised as `resnet`.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pupil.models import residual
from pupil.models.residual import BasicBlock, Block, Bottleneck, initialised, small_stem, stage
from pupil.net import Net, Stage


class Branches(NamedTuple):
    """The dimension last is the peers (P)."""

    logits: Tensor  # (B, K) of the leader
    peers: Tensor  # (B, K, P) logits; the authors' `out_pro`
    mixed: Tensor  # (B, K, P) for each peer, all peers' logits weighted by its attention; the authors' `out_x_m`


class MultiBranch(Net):
    """Stem and two stages that all branches share; `last`: the last stage of each branch, the leader's at the end."""

    classifiers = ("head", "peer_heads.0", "peer_heads.1")

    def __init__(self, stem: nn.Module, shared: list[Stage], last: list[Stage], width: int, num_classes: int) -> None:
        *peers, leader = last
        super().__init__(stem, [*shared, leader], nn.Linear(width, num_classes))
        self.peers = nn.ModuleList(peers)
        self.peer_heads = nn.ModuleList(nn.Linear(width, num_classes) for _ in peers)
        self.query = nn.Linear(width, width // 8, bias=False)
        self.key = nn.Linear(width, width // 8, bias=False)

    def branches(self, x: Tensor) -> Branches:
        """(B, 3, H, W) -> what every branch answers."""
        x = self.stem(x)
        for shared in list(self.stages)[:-1]:
            _, _, x = shared(x)
        _, leading = self.pool(self.stages[-1](x)[2])
        embeddings = [self.pool(peer(x)[2])[1] for peer in self.peers]
        e = torch.stack(embeddings, 1)  # (B, P, D)
        peers = torch.stack([head(e_p) for head, e_p in zip(self.peer_heads, embeddings, strict=True)], 2)
        attention = (self.query(e) @ self.key(e).mT).softmax(2)  # (B, P, P)
        return Branches(self.head(leading), peers, peers @ attention.mT)


def multi_branch(blocks: Sequence[Block], n: int, widths: tuple[int, int, int], num_classes: int) -> MultiBranch:
    """n blocks in each stage; `blocks`: what builds those of each stage; `widths`: of the stages."""
    (one, two, three), (a, b, c) = blocks, widths
    shared = [stage(one, n, 16, a, 1), stage(two, n, a, b, 2)]
    return initialised(MultiBranch(small_stem(16), shared, [stage(three, n, b, c, 2) for _ in range(3)], c, num_classes))


def published_key(key: str) -> str:
    """The key of a tensor in the authors' checkpoints -> ours."""
    key = re.sub(r"^(layer|classifier)3_2\.", lambda m: {"layer": "layer3.", "classifier": "fc."}[m[1]], key)
    key = re.sub(r"^layer3_(\d)\.", r"peers.\1.blocks.", key)
    key = re.sub(r"^classifier3_(\d)\.", r"peer_heads.\1.", key)
    key = re.sub(r"^(query|key)_weight\.", r"\1.", key)
    return residual.published_key(key)


def resnet32_gl(num_classes: int) -> Net:
    return multi_branch([BasicBlock] * 3, 5, (16, 32, 64), num_classes)


def resnet110_gl(num_classes: int) -> Net:
    return multi_branch([Bottleneck] * 3, 12, (64, 128, 256), num_classes)


def wide_resnet20_8_gl(num_classes: int) -> Net:
    blocks = [partial(Bottleneck, inner=inner) for inner in (128, 256, 512)]
    return multi_branch(blocks, 2, (64, 128, 256), num_classes)
