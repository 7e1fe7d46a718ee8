"""How far the training is: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TextIO

from pupil.types import Batch

SECONDS, BAR_SECONDS = 5.0, 0.2  # between two lines, two moves of the bar


class Progress:
    """`watch` wraps an epoch's batches; `log` takes the epoch's metrics."""

    def __init__(self, title: str, batches: int, out: TextIO | None = None, students: int = 1) -> None:
        """`batches`: of one epoch; `out`: standard output if not given; `students`: that are trained side by side."""
        self.title, self.batches, self.out, self.students = title, batches, out or sys.stdout, students
        self.started = self.shown = time.monotonic()
        self.epochs = self.epoch = self.done = self.before = 0
        self.phase, self.step = "", 0
        self.accuracies: list[float] = []  # of the epoch `step`
        self.latest = ""
        self.bar = make_bar(title) if self.out.isatty() else None

    def watch(self, batches: Iterable[Batch], phase: str, epoch: int, epochs: int, first: int = 0) -> Iterator[Batch]:
        """`first`: batches of the epoch that were done before."""
        if self.phase != phase or epoch != self.epoch + 1:
            self.started, self.before = time.monotonic(), (epoch - 1) * self.batches + first
            self.phase, self.done = phase, self.before
        self.epoch, self.epochs = epoch, epochs
        for batch in batches:
            yield batch
            self.done += 1
            if self.done % self.batches or self.bar is not None:  # the end of an epoch is shown by `log`, with its numbers
                self.show(now=False)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Of several students one after another: then the range of their accuracies is shown."""
        if step != self.step:
            self.step, self.accuracies = step, []
        self.accuracies.append(values["val/top1"])
        loss = next((v for k, v in values.items() if k.endswith("/loss")), float("nan"))
        low, high = min(self.accuracies), max(self.accuracies)
        said = f"loss {loss:.4g}  val {high:.2f} %" if len(self.accuracies) == 1 else f"val {low:.2f} to {high:.2f} %"
        self.latest = f"{said}  {values['images_per_second']:.0f} images/s"
        self.show(now=self.epoch == self.epochs and len(self.accuracies) == self.students)

    def show(self, now: bool) -> None:
        """Every step moves the bar; lines come a few seconds apart, and after the last epoch."""
        wait = SECONDS if self.bar is None else BAR_SECONDS
        if not now and time.monotonic() - self.shown < wait:
            return
        self.shown = time.monotonic()
        total, head = self.batches * self.epochs, f"{self.title}  epoch {self.epoch}/{self.epochs}"
        if self.bar is not None:
            self.bar.total, self.bar.n = total, self.done
            self.bar.set_description_str(head, refresh=False)
            self.bar.set_postfix_str(self.latest, refresh=False)
            self.bar.refresh()
        else:
            left = (self.shown - self.started) / max(self.done - self.before, 1) * (total - self.done)
            self.out.write(f"{head}  {self.latest}  {left:.0f} s left\n")
            self.out.flush()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def make_bar(title: str):
    """tqdm's bar, or None where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=1, desc=title, bar_format="{desc} |{bar}| {elapsed}<{remaining}{postfix}")
