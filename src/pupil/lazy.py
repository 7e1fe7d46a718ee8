"""Features whose tensors are changed when they are first read, so that what no loss reads costs nothing.

On a GPU they are changed in the stream that made them, and a reader in another stream waits for it.
"""

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from pupil.lanes import after, at

Change = Callable[[Tensor], Tensor]


class Lazy:
    """`Features`, or another `Lazy`, of which every tensor that is read goes through `change` once."""

    def __init__(
        self, part: Any, change: Change, given: dict[str, Tensor] | None = None, home: torch.cuda.Stream | None = None
    ) -> None:
        self.part, self.change, self.home = part, change, home
        self.found: dict[int, Tensor] = {}
        self.__dict__.update(given or {})

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.part, name)
        return self.changed(value) if isinstance(value, Tensor) else Spots(value, self.changed)

    def _replace(self, **given: Tensor) -> "Lazy":
        return Lazy(self.part, self.change, given, self.home)

    def changed(self, part: Tensor) -> Tensor:
        if id(part) not in self.found:
            with torch.set_grad_enabled(part.requires_grad), at(self.home):  # also where it is first read without gradients
                self.found[id(part)] = self.change(part)
        after(self.home)
        return self.found[id(part)]


class Spots(Sequence[Tensor]):
    def __init__(self, parts: Sequence[Tensor], change: Change) -> None:
        self.parts, self.change = parts, change

    def __len__(self) -> int:
        return len(self.parts)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Tensor, ...]: ...
    def __getitem__(self, index: int | slice) -> Tensor | tuple[Tensor, ...]:
        if isinstance(index, slice):
            return tuple(self.change(part) for part in self.parts[index])
        return self.change(self.parts[index])
