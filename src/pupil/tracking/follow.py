"""The other side of `Stream`, one process for all records of a training: python -m pupil.tracking.follow HOME EXPERIMENT.

Lines of JSON on standard input say what happens to a record: ["open", NUMBER, FOLDER], ["grew", NUMBER], ["end", NUMBER]; the
end of the input is that of all of them (or their writer is dead).  Each is answered, once, on standard output:
[NUMBER, whether its run is complete in the store].  Ends with status 0 where all are.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from pupil.tracking import warn
from pupil.tracking.mirror import Mirror
from pupil.tracking.store import Store, address, connect, first_line, load_mlflow

PATIENCE, PATIENCE_UNANSWERED = 120.0, 8.0  # seconds, from the end of the record on
AGAIN = 30.0  # seconds after which a store that failed is asked again
INCOMPLETE = 3  # exit status


class Growing:
    """A record on its way to the store."""

    def __init__(self, number: int, folder: Path) -> None:
        self.number, self.folder = number, folder
        self.mirror: Mirror | None = None
        self.news = self.busy = False  # busy: being pushed
        self.due = 0.0  # when it may be pushed again, time.monotonic()
        self.ended: float | None = None


class Follower:
    """Pushes the records that have news in turn, each at most about once a second."""

    def __init__(self, home: Path, experiment: str, answer: Callable[[int, bool], None]) -> None:
        self.home, self.experiment, self.answer = home, experiment, answer
        self.records: dict[int, Growing] = {}
        self.change = threading.Condition()  # of anything here
        self.closed = False  # no more records will come
        self.complete = True
        self.pusher: threading.Thread | None = None
        self.store: Store | None = None
        self.asked: float | None = None  # when the store was asked for the first time since it last failed, time.monotonic()
        self.again = self.hopeless = 0.0  # until then it is not asked because of records that grow, or that have ended
        self.failed = False  # and said so

    def listen(self, lines: Iterable[bytes]) -> None:
        """In a thread of its own."""
        for line in lines:
            with contextlib.suppress(ValueError, TypeError):  # a writer that died in the middle of it
                self.hear(*json.loads(line))
        with self.change:
            self.closed = True
            for record in self.records.values():
                self.hear("end", record.number)
            self.change.notify_all()

    def hear(self, event: str, number: int, folder: str = "") -> None:
        with self.change:
            if event == "open":
                self.records[number] = Growing(number, Path(folder))
            elif record := self.records.get(number):  # else it is complete or given up
                record.news = True
                if event == "end" and record.ended is None:
                    record.ended = time.monotonic()
            self.change.notify_all()

    def follow(self) -> bool:
        """Until all records have ended; gives up those whose time is over.  Whether every run is complete."""
        with self.change:
            self.start()
            while self.records or not self.closed:
                ended = [record for record in self.records.values() if record.ended is not None]
                if late := [r for r in ended if time.monotonic() >= self.deadline(r.ended or 0.0)]:
                    self.start()  # the other one waits for a store that does not answer
                    if self.store is None:
                        self.again = self.hopeless = time.monotonic() + AGAIN
                for record in late:
                    self.close(record, complete=False)
                self.change.wait(0.1 if ended else None)
        return self.complete

    def deadline(self, ended: float) -> float:
        if self.store is not None or self.asked is None or not address(self.home)[1]:
            return ended + PATIENCE
        return max(ended, self.asked) + PATIENCE_UNANSWERED

    def start(self) -> None:
        self.pusher = threading.Thread(target=self.push_in_turn, daemon=True)
        self.pusher.start()

    def push_in_turn(self) -> None:
        """A store that fails is asked again later."""
        while record := self.next():
            last, error = record.ended is not None, None  # before the push: it sees all that was written before the end
            try:
                complete = self.push(record, last)
            except Exception as e:
                complete, error = False, e
            with self.change:
                record.busy, record.due = False, time.monotonic() + 1
                if error is not None:
                    self.fail(record, error, last)
                if complete or last:
                    self.close(record, complete)

    def next(self) -> Growing | None:
        """The record whose turn it is: one that has ended, else the one that was pushed the longest time ago."""
        with self.change:
            while threading.current_thread() is self.pusher:
                waiting = [r for r in self.records.values() if r.news and not r.busy]
                when = {r: 0.0 if r.ended is not None else max(r.due, self.again) for r in waiting}
                left = min(when.values(), default=float("inf")) - time.monotonic()
                if left <= 0:
                    record = min(waiting, key=lambda r: (when[r], r.due))
                    record.news, record.busy = False, True
                    return record
                self.change.wait(min(left, AGAIN))
        return None

    def push(self, record: Growing, last: bool) -> bool:
        """Whether the run is complete."""
        if self.store is None:
            if last and time.monotonic() < self.hopeless:
                return False
            load_mlflow()
            self.asked = time.monotonic()
            self.store = connect(self.home, self.experiment)
        mirror = record.mirror = record.mirror or Mirror(record.folder, self.store)
        complete = mirror.push()
        if last and mirror.refused:
            warn(f"WARNING tracking: the store refuses {mirror.refused[0]}; {len(mirror.refused)} in all")
        elif last and not complete:
            mirror.abandon()
        return complete

    def fail(self, record: Growing, error: Exception, last: bool) -> None:
        """Of a push the next one finds out what came through."""
        later = time.monotonic() + AGAIN
        if self.store is None:  # it is down, for all records
            self.again = later
            self.hopeless = later if last else self.hopeless
        record.mirror, record.news, record.due = None, True, later
        self.store = self.asked = None
        if last and not (record.folder / "record.json").exists():  # of a killed training, removed: nobody waits
            return
        if not self.failed:  # once: a store that is down for an hour is one fault
            warn(f"WARNING tracking is off: {first_line(error)}; training goes on, the store is asked again now and then")
        self.failed = True

    def close(self, record: Growing, complete: bool) -> None:
        if self.records.pop(record.number, None):
            self.complete &= complete
            self.answer(record.number, complete)
            self.change.notify_all()


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the training, which then ends the record
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)  # the training goes first
    answers = os.dup(1)
    os.dup2(2, 1)  # what mlflow prints is no answer

    def answer(number: int, complete: bool) -> None:
        with contextlib.suppress(OSError):  # nobody waits for it
            os.write(answers, json.dumps([number, complete]).encode() + b"\n")

    follower = Follower(Path(sys.argv[1]), sys.argv[2], answer)
    threading.Thread(target=follower.listen, args=(sys.stdin.buffer,), daemon=True).start()
    complete = follower.follow()
    sys.stderr.flush()
    os._exit(0 if complete else INCOMPLETE)  # not waiting for threads that mlflow may have left


if __name__ == "__main__":
    main()
