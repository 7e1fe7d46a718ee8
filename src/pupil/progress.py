"""How far the training is: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TextIO

from pupil.types import Batch

SECONDS, BAR_SECONDS = 5.0, 0.2  # between two lines, two moves of the bar


class Progress:
    """`watch` wraps an epoch's batches; `log` takes the epoch's metrics."""

    def __init__(self, title: str, batches: int, out: TextIO | None = None) -> None:
        """`batches`: of one epoch; `out`: standard output if not given."""
        self.title, self.batches, self.out = title, batches, out or sys.stdout
        self.started = self.shown = time.monotonic()
        self.epochs = self.epoch = self.done = self.before = 0
        self.phase = ""
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
        loss = next((v for k, v in values.items() if k.endswith("/loss")), float("nan"))
        self.latest = f"loss {loss:.4g}  val {values['val/top1']:.2f} %  {values['images_per_second']:.0f} images/s"
        self.show(now=self.epoch == self.epochs)

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
