"""The only network class: stem, stages, neck, global average pool, head."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from pupil.types import Features, UserError


class Stage(nn.Module):
    """Blocks of one resolution, with the tap at their end.

    Post-activation networks: the map is act(blocks(x)), and that goes on.
    Pre-activation networks (`norm` given): the map is blocks(x), signed; act(norm(map)) goes on.
    """

    def __init__(self, *blocks: nn.Module, act: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.view = nn.Identity()  # from what goes on to (B, C, H, W), where that is something else
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm
        self.act = act

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(before the next ReLU, the map, what goes on)."""
        x = self.blocks(x)
        if self.norm is None:
            out = self.act(x)
            return x, out, out
        pre = self.norm(x)
        return pre, x, self.act(pre)

    def to_map(self, x: Tensor) -> Tensor:
        """The first half of `forward`: what comes in -> the map, as it is before `view`."""
        return self.blocks(x) if self.norm is not None else self.act(self.blocks(x))

    def onward(self, x: Tensor) -> Tensor:
        """The second half: a map -> what goes on."""
        return x if self.norm is None else self.act(self.norm(x))


class GlobalPool(nn.Module):
    """(B, C, H, W) -> what is pooled, as it is, and its mean (B, C)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.mean((2, 3))


class Net(nn.Module):
    """A classifier whose taps are outputs: no hooks, so it compiles as one graph."""

    name = ""  # of a network from elsewhere
    classifiers: ClassVar[tuple[str, ...]] = ("head",)  # the submodules that make logits
    pools_last = True  # whether the embedding is the mean of the last map, as SimKD needs of a teacher

    def __init__(
        self,
        stem: nn.Module,
        stages: Iterable[Stage],
        head: nn.Module,
        neck: nn.Module | None = None,
        pool: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stem, self.stages = stem, nn.ModuleList(stages)
        self.neck = nn.Identity() if neck is None else neck
        self.pool = GlobalPool() if pool is None else pool
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, K) logits."""
        return self.features(x).logits

    def features(self, x: Tensor) -> Features:
        x = stem = self.stem(x)
        maps, pres = [], []
        for stage in self.stages:
            pre, tap, x = stage(x)
            pres.append(pre)
            maps.append(tap)
        last, embedding = self.pool(self.neck(x))
        return Features(stem, tuple(maps), tuple(pres), last, embedding, self.head(embedding))


class FrozenLinear(nn.Module):
    """A classifier that nothing can train by accident: its weights are buffers, not parameters."""

    weight: Tensor  # (K, D)
    bias: Tensor  # (K,)

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(out_features, in_features))
        self.register_buffer("bias", torch.zeros(out_features))

    @classmethod
    def of(cls, head: nn.Module, classes: Sequence[int] | None = None) -> "FrozenLinear":
        """A frozen copy of a linear classifier, or of the outputs `classes`; a bias that it has not is zero."""
        if not isinstance(head, nn.Linear | FrozenLinear):
            raise UserError(
                f"a classifier that is a {type(head).__name__} can be neither lent nor cut to some classes, an nn.Linear can;"
                " use data.teacher_classes=null and a method that lends no classifier, such as kd"
            )
        frozen = cls(head.weight.shape[1], len(head.weight if classes is None else classes)).to(head.weight.device)
        kept = slice(None) if classes is None else list(classes)
        with torch.no_grad():
            frozen.weight.copy_(head.weight[kept])
            if head.bias is not None:
                frozen.bias.copy_(head.bias[kept])
        return frozen.train(head.training)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def cut(net: Net, classes: Sequence[int]) -> None:
    """Leaves a network those of its outputs, in that order: its softmax is then renormalised over them."""
    for name in net.classifiers:
        net.set_submodule(name, FrozenLinear.of(net.get_submodule(name), classes))


@torch.no_grad()
def probe(net: Net, image_size: int) -> Features:
    """The taps of one black image, for their shapes; the network is left as it was."""
    with evaluating(net):
        return net.features(torch.zeros(1, 3, image_size, image_size, device=next(net.parameters()).device))


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
