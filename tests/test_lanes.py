"""In which order CUDA streams wait for one another, by streams that only write down what is asked of them."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from pupil import lanes as pupil_lanes
from pupil.checks import check
from pupil.config import load_settings
from pupil.lanes import Graphs, Streams, Turns, lanes
from pupil.lazy import Lazy
from pupil.speed import Speed, choose
from pupil.types import Features, UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Gpu:
    """Streams by name, and what was asked for, in order."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.made = 0
        self.here = self.stream("main")

    def stream(self, name: str) -> "Stream":
        return Stream(self, name)

    def Stream(self, device: torch.device) -> "Stream":
        self.made += 1
        return self.stream(f"lane {self.made - 1}")

    def current_stream(self, device: torch.device) -> "Stream":
        return self.here

    @contextmanager
    def use(self, stream: "Stream") -> Iterator[None]:
        before, self.here = self.here, stream
        try:
            yield
        finally:
            self.here = before

    def compute(self, what: str) -> None:
        self.said.append(f"{self.here.name}: {what}")


class Stream:
    device = CUDA

    def __init__(self, gpu: Gpu, name: str) -> None:
        self.gpu, self.name = gpu, name

    def wait_stream(self, other: "Stream") -> None:
        self.gpu.said.append(f"{self.name}: wait for {other.name}")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    for name, value in (("Stream", made.Stream), ("current_stream", made.current_stream), ("stream", made.use)):
        monkeypatch.setattr(pupil_lanes.torch.cuda, name, value)
    return made


def test_each_student_waits_for_the_teacher_and_the_next_batch_for_all_students(gpu: Gpu) -> None:
    found = lanes(2, CUDA, overlap=True, graphs=False)
    assert isinstance(found, Streams)
    for batch in range(2):
        found.begin()
        gpu.compute(f"teacher {batch}")
        for number in range(2):
            with found.lane(number):
                gpu.compute(f"student {batch}")
        found.end()
    assert gpu.said == [
        line
        for batch in range(2)
        for line in (
            f"main: teacher {batch}",
            "lane 0: wait for main",
            f"lane 0: student {batch}",
            "lane 1: wait for main",
            f"lane 1: student {batch}",
            "main: wait for lane 0",
            "main: wait for lane 1",
        )
    ]


def test_what_several_streams_read_is_changed_once_where_it_was_made(gpu: Gpu) -> None:
    def change(part: Tensor) -> Tensor:
        gpu.compute("cast")
        return part.float()

    x = torch.zeros(2, dtype=torch.bfloat16)
    features: Features = Lazy(Features(x, (x,), (x,), x, x, x), change, home=gpu.here)  # type: ignore[assignment]
    found = Streams(2, CUDA)
    for number in range(2):
        with found.lane(number):
            assert features.logits.dtype == torch.float32
    assert features.maps[0] is features.logits, "the same tensor underneath"
    waits = ["lane 0: wait for main", "main: cast", "lane 0: wait for main", "lane 1: wait for main", "lane 1: wait for main"]
    assert gpu.said == waits, "the reader waits for the cast; the home stream for nobody"


@pytest.mark.parametrize(("students", "device", "overlap"), [(1, CUDA, True), (2, CPU, True), (2, CUDA, False)])
def test_without_a_gpu_or_company_or_the_setting_there_are_no_streams(
    students: int, device: torch.device, overlap: bool
) -> None:
    assert type(lanes(students, device, overlap, graphs=False)) is Turns


def test_compiled_networks_are_cuda_graphs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[None] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    speed = choose("float32", "contiguous", True, CUDA)
    assert speed == Speed(compile="both", graphs=True)
    assert str(speed) == "float32, both compiled, in CUDA graphs"
    found = lanes(3, CUDA, True, speed.graphs)
    assert type(found) is Graphs
    found.begin()
    assert len(begun) == 1
    assert not choose("float32", "contiguous", "auto", CUDA).compile, "nothing was measured there"


def test_streams_and_graphs_together_are_refused() -> None:
    with pytest.raises(UserError, match=r"overlap: expected false with compile: true \(CUDA graphs\), got True"):
        check(dataclasses.replace(load_settings(), overlap=True, compile=True))
