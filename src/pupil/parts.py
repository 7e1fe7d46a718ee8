"""Where the time of a training step goes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pupil.fit import Teach, step
from pupil.methods.base import Phase
from pupil.types import Batch

PARTS = ("waiting for a batch", "teacher", "student forward", "loss", "backward", "optimiser", "rest")


class Parts:
    """Seconds by part; where it is off, it costs nothing and waits for nothing."""

    def __init__(self, on: bool, device: torch.device) -> None:
        self.on, self.device = on, device
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def __call__(self, part: str, within: str | None = None) -> Iterator[None]:
        """`within`: the part that this one is inside of, and is taken from."""
        if not self.on:
            yield
            return
        begin = self.now()
        yield
        taken = self.now() - begin
        self.seconds[part] += taken
        if within is not None:
            self.seconds[within] -= taken

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, call: Callable[..., Any], part: str, within: str | None = None) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self(part, within):
                return call(*args, **kwargs)

        return run

    def step(self, method: Any, teach: Teach, batch: Batch, phase: Phase, optimizer: torch.optim.Optimizer) -> None:
        """The step of `pupil.fit`, taken apart; of DOT the backward passes include the update."""
        if not self.on:
            step(method, teach(batch), batch, phase, optimizer)
            return
        with self("teacher"):
            t = teach(batch)
        student, plain, descent = method.student, torch.Tensor.backward, "descend" if hasattr(optimizer, "descend") else "step"
        backward, update = self.timed(plain, "backward", "rest"), getattr(optimizer, descent)
        try:
            torch.Tensor.backward = lambda *args, **kwargs: backward(*args, **kwargs)  # type: ignore[method-assign]
            setattr(optimizer, descent, self.timed(update, "optimiser" if descent == "step" else "backward", "rest"))
            student.__dict__["features"] = self.timed(student.features, "student forward", "loss")
            method.__dict__["forward"] = self.timed(method.forward, "loss", "rest")
            with self("rest"):
                step(method, t, batch, phase, optimizer)
        finally:
            torch.Tensor.backward = plain  # type: ignore[method-assign]
            setattr(optimizer, descent, update)
            del student.__dict__["features"], method.__dict__["forward"]

    def table(self, steps: int) -> list[str]:
        """Lines: milliseconds per step and share; the last says what the run is bound by."""
        total = sum(self.seconds.values())
        lines = [f"  {part:20s} {1e3 * s / steps:8.1f} ms {100 * s / total:5.1f} %" for part, s in self.seconds.items()]
        waiting = self.seconds[PARTS[0]]
        bound = "loading" if waiting > total - waiting else "computing"
        return [*lines, f"  bound by {bound}: it waits for batches {100 * waiting / total:.0f} % of the time"]
