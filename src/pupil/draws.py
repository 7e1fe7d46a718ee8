"""A stream of torch's random numbers that belongs to one training, whatever else draws in the same process."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Stream:
    """Goes on where torch's generators (the CPU's, and that of the GPU in use) are when it is made."""

    def __init__(self) -> None:
        self.state = now()

    @contextmanager
    def flowing(self) -> Iterator[None]:
        """What is drawn for a while is drawn from this stream; the generators are then as they were."""
        before = now()
        put(self.state)
        try:
            yield
        finally:
            self.state = now()
            put(before)


def now() -> dict[str, Tensor]:
    gpu = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() and torch.cuda.is_initialized() else {}
    return {"cpu": torch.get_rng_state(), **gpu}


def put(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
