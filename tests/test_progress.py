"""How far the training is: lines in a log, a bar on a terminal."""

import io
import re
from collections.abc import Iterator

import pytest

from pupil import progress
from pupil.progress import Progress
from pupil.types import Batch
from tests import tiny

VALUES = {"train/ce": 0.5, "train/loss": 1.23456, "val/top1": 87.654, "images_per_second": 1234.5, "lr": 0.1}
LINE = re.compile(r"a job  epoch (\d)/(\d)  loss 1\.235  val 87\.65 %  1234 images/s  (\d+) s left")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A batch takes a second."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress.time, "monotonic", found.monotonic)
    return found


def train(p: Progress, clock: Clock, epochs: int, batches: int, seconds: float = 1.0) -> None:
    def slow() -> Iterator[Batch]:
        for _ in range(batches):
            clock.now += seconds
            yield tiny.first_batch(2)

    for epoch in range(1, epochs + 1):
        for _ in p.watch(slow(), "train", epoch, epochs):
            pass
        p.log(VALUES, epoch)
    p.close()


def test_a_log_gets_a_line_every_few_seconds_with_numbers_and_time_left(clock: Clock) -> None:
    out = io.StringIO()
    train(Progress("a job", 4, out), clock, epochs=5, batches=4)
    lines = out.getvalue().splitlines()
    assert 3 <= len(lines) <= 1 + 20 / progress.SECONDS
    found = [LINE.fullmatch(line) for line in lines[1:]]
    assert all(found), lines
    assert lines[-1].endswith("epoch 5/5  loss 1.235  val 87.65 %  1234 images/s  0 s left")
    left = [int(m[3]) for m in found if m]
    assert left == sorted(left, reverse=True)
    assert left[0] <= 20
    assert "\r" not in out.getvalue()


def test_a_short_training_gets_one_line_at_its_end(clock: Clock) -> None:
    out = io.StringIO()
    train(Progress("a job", 4, out), clock, epochs=3, batches=4, seconds=0.1)
    (line,) = out.getvalue().splitlines()
    assert "epoch 3/3" in line


def test_students_side_by_side_share_a_line_with_the_range_of_their_accuracies(clock: Clock) -> None:
    out = io.StringIO()
    p = Progress("a table", 2, out, students=3)
    for epoch in (1, 2):
        for _ in p.watch(iter([tiny.first_batch(2)] * 2), "distil", epoch, 2):
            clock.now += 1
        for top1 in (70.0, 90.0 + epoch, 80.0):
            p.log(VALUES | {"val/top1": top1}, epoch)
    assert out.getvalue().splitlines() == ["a table  epoch 2/2  val 70.00 to 92.00 %  1234 images/s  0 s left"]


def test_a_second_phase_starts_the_time_anew(clock: Clock) -> None:
    out = io.StringIO()
    p = Progress("a job", 2, out)
    train(p, clock, epochs=1, batches=2, seconds=50.0)
    train(p, clock, epochs=4, batches=2, seconds=3.0)
    early = next(line for line in out.getvalue().splitlines() if "epoch 2/4" in line)
    assert int(re.findall(r"(\d+) s left", early)[0]) <= 4 * 2 * 3


def test_the_time_left_is_that_of_the_batches_left(clock: Clock) -> None:
    out = io.StringIO()
    train(Progress("a job", 10, out), clock, epochs=1, batches=10, seconds=6.0)
    left = [int(x) for x in re.findall(r"(\d+) s left", out.getvalue())]
    assert len(left) == 10
    assert all(0 <= n <= 60 for n in left)
    assert left[-1] == 0


def test_a_terminal_gets_a_bar(capfd: pytest.CaptureFixture[str], clock: Clock) -> None:
    out = Terminal()
    train(Progress("a job", 4, out), clock, epochs=2, batches=4)
    shown = out.getvalue() + "".join(capfd.readouterr())
    assert "\r" in shown
    assert "epoch 2/2" in shown
    assert "val 87.65 %" in shown
    assert "s left" not in shown


def test_standard_output_of_the_moment_is_used(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    train(Progress("a job", 1), clock, epochs=1, batches=1)
    assert "epoch 1/1" in capsys.readouterr().out
