"""Networks of whose batches each process takes its share, exact for every method.

`features` of student and teacher sees the process's own rows of the batch, and what a loss then reads of the result is
gathered from all.  So each process has the loss of the whole batch, whatever relates its images to each other, and
memory banks, batch norms of adapters and random negatives need no care.

Gradients: that of a gathered tensor goes to the own rows alone, times the number of processes W; then the gradient of
every parameter is averaged over the processes.  Within a network that sums the parts, outside it is the mean of equal
ones, and a parameter that is used in both ways gets both.

Within a network, batch norm in train mode takes the statistics of the whole batch, and dropout and drop path draw for
the whole batch and keep the own rows; another layer that relates images or draws is not known here.  A batch of fewer
images than W is run whole by every process.  The images are read and augmented by every process.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from pupil.distributed import several
from pupil.lazy import Lazy
from pupil.methods.alone import Alone
from pupil.methods.base import Method
from pupil.net import Net
from pupil.types import Features

DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


@contextmanager
def divided(method: Method | Alone, teacher: Net | None) -> Iterator[None]:
    """For a while the work of both networks is divided; all start from the first process's weights."""
    kinds = {net: type(net) for net in (method.student, teacher) if net is not None and several()}
    for module in (method, teacher):
        for tensor in module.state_dict().values() if module is not None and several() else ():
            dist.broadcast(tensor, 0)
    for net, kind in kinds.items():
        net.__class__ = type(kind.__name__, (Divided, kind), {})
    try:
        yield
    finally:
        for net, kind in kinds.items():
            net.__class__ = kind


class Shares(NamedTuple):
    """How the rows of a batch are divided: contiguous, and as equal as can be."""

    rows: int
    sizes: list[int]  # of each process, at least 1
    own: slice

    @classmethod
    def of(cls, rows: int) -> "Shares":
        ends = [rows * r // dist.get_world_size() for r in range(dist.get_world_size() + 1)]
        me = dist.get_rank()
        return cls(rows, [b - a for a, b in itertools.pairwise(ends)], slice(ends[me], ends[me + 1]))

    def of_own(self, x: Tensor) -> Tensor:
        """(rows, ...) -> (own rows, ...)."""
        return x[self.own]


class Divided(Net):
    """Any network, of whose images each process takes its share."""

    def features(self, x: Tensor) -> Features:
        if len(x) < dist.get_world_size():
            return super().features(x)
        shares = Shares.of(len(x))
        with AsWhole(shares):
            part = super().features(shares.of_own(x))
        return cast(Features, Lazy(part, partial(gather, shares=shares)))  # what of it a loss reads is gathered


def gather(part: Tensor, shares: Shares) -> Tensor:
    return cast(Tensor, Gather.apply(part, shares))


class Gather(Function):
    """(own rows, ...) -> (rows, ...)."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, shares: Shares) -> Tensor:
        ctx.shares, most = shares, max(shares.sizes)
        sent = part.new_zeros(most, *part.shape[1:])
        sent[: len(part)] = part
        got = [torch.empty_like(sent) for _ in shares.sizes]
        dist.all_gather(got, sent)
        return torch.cat([piece[:size] for piece, size in zip(got, shares.sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.shares.of_own(grads[0]) * len(ctx.shares.sizes), None


class Norm(Function):
    """Batch norm of the own rows by the statistics of all of them; the gradient of these comes from all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, n: int, eps: float) -> Tensor:
        """`mean`, `var` (C,): of all processes; `n`: numbers of each channel that they are of."""
        ctx.save_for_backward(x, weight, mean, var)
        ctx.n, ctx.eps = n, eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With y = w z + b and z = (x - mean) r: dx = w r (dy - <dy> - z <dy z>), the means <> over all processes."""
        x, weight, mean, var = ctx.saved_tensors
        about = (weight, mean, var, None, None, False, ctx.eps, [True] * 3)
        dx, dw, db = torch.ops.aten.native_batch_norm_backward(grads[0], x, *about)  # those of fixed statistics
        total = torch.cat([db, dw])
        dist.all_reduce(total)
        r = (var + ctx.eps).rsqrt()
        plain, along = (weight * r * total.view(2, -1) / ctx.n).unbind()
        slope = (-along * r).to(dx.dtype)
        shape = (1, -1, *[1] * (x.dim() - 2))
        dx = dx.add((along * r * mean - plain).to(dx.dtype).view(shape)).addcmul_(x, slope.view(shape))
        return dx, dw, db, None, None, None, None


def statistics(x: Tensor, shares: Shares) -> tuple[Tensor, Tensor, int]:
    """Mean and variance (C,) over all processes' rows, and of how many numbers.  Two passes: on a CPU var_mean is slow."""
    rest = [d for d in range(x.dim()) if d != 1]
    shape = (1, -1, *[1] * (x.dim() - 2))
    own_mean = x.mean(rest)
    own = torch.cat([own_mean, (x - own_mean.view(shape)).square_().mean(rest)])
    got = [torch.empty_like(own) for _ in shares.sizes]
    dist.all_gather(got, own)
    means, variances = torch.stack(got).chunk(2, 1)  # (W, C) each
    share = x.new_tensor(shares.sizes)[:, None] / shares.rows
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)
    return mean, var, x.numel() // x.shape[1] // len(x) * shares.rows


class AsWhole(TorchFunctionMode):
    """Makes the layers that relate images, or draw for them, treat the own rows as those of the whole batch."""

    def __init__(self, shares: Shares) -> None:
        super().__init__()
        self.shares = shares
        self.table: dict[Any, Callable[..., Tensor]] = {F.batch_norm: self.batch_norm, Tensor.bernoulli_: self.bernoulli_}
        self.table |= {kind: partial(self.dropout, kind) for kind in DROPOUTS}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours: Any = self.table.get(func, func)
        return ours(*args, **(kwargs or {}))

    def batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        with torch.no_grad():
            mean, var, n = statistics(x, self.shares)
            if running_mean is not None and running_var is not None:
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                running_var.lerp_(var.to(running_var.dtype) * n / (n - 1), momentum)
        weight = torch.ones_like(mean) if weight is None else weight
        bias = torch.zeros_like(mean) if bias is None else bias
        return cast(Tensor, Norm.apply(x, weight, bias, mean, var, n, eps)).to(input.dtype)

    def dropout(self, kind: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        whole, own = self.room(input)
        if not training or whole is None:
            return kind(input, p, training, inplace)
        whole[own] = input
        return kind(whole, p)[own]

    def bernoulli_(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        whole, own = self.room(input)
        return input.bernoulli_(*args, **kwargs) if whole is None else input.copy_(whole.bernoulli_(*args, **kwargs)[own])

    def room(self, part: Tensor) -> tuple[Tensor | None, slice]:
        """Zeros for the whole batch, and where `part` belongs; none where its first dimension is not the images'."""
        each, rest = divmod(len(part) if part.dim() else 0, self.shares.sizes[dist.get_rank()])  # patches of each image
        if not each or rest:
            return None, self.shares.own
        own = slice(each * self.shares.own.start, each * self.shares.own.stop)
        return part.new_zeros(each * self.shares.rows, *part.shape[1:]), own
