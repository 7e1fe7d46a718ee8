"""How the students of a batch take their steps on a device: in turns, or on a GPU in CUDA streams of their own.

A stream's step begins when the batch and the teacher's answer are there, and the next batch when all streams are done: no
memory of the batch, of the teacher or of a student is given back while another stream may still read it.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


class Turns:
    """One student after the other, in the order in which they are given."""

    def begin(self) -> None:
        """A batch, before the teacher sees it."""

    def lane(self, number: int) -> AbstractContextManager[object]:
        """For the step of one student."""
        return nullcontext()

    def end(self) -> None:
        """All students have taken their step."""


class Streams(Turns):
    """A CUDA stream for each student, so that small steps share the GPU."""

    def __init__(self, students: int, device: torch.device) -> None:
        self.device = device
        self.streams = [torch.cuda.Stream(device) for _ in range(students)]

    def lane(self, number: int) -> AbstractContextManager[object]:
        self.streams[number].wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.streams[number])

    def end(self) -> None:
        for stream in self.streams:
            torch.cuda.current_stream(self.device).wait_stream(stream)


class Graphs(Turns):
    """For networks that torch.compile turned into CUDA graphs: what they return lives until the next batch, and no longer."""

    def begin(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()


def lanes(students: int, device: torch.device, overlap: bool, graphs: bool) -> Turns:
    """`overlap`: in streams, where there are a GPU and several students; `graphs`: the networks are CUDA graphs."""
    if graphs:
        return Graphs()
    return Streams(students, device) if overlap and device.type == "cuda" and students > 1 else Turns()


def home_of(x: Tensor) -> torch.cuda.Stream | None:
    """The stream in which `x` is being computed, on a GPU."""
    return torch.cuda.current_stream(x.device) if x.is_cuda else None


def at(home: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return nullcontext() if home is None else torch.cuda.stream(home)


def after(home: torch.cuda.Stream | None) -> None:
    """What is computed from here on waits for all that `home` was given to do."""
    if home is not None and (here := torch.cuda.current_stream(home.device)) != home:
        here.wait_stream(home)
