"""The other side of `Stream`: python -m pupil.tracking.follow RECORD HOME EXPERIMENT.

A byte on standard input says that the record has grown, its end that the record is finished (or its writer dead).
Ends with status 0 where the run is complete in the store.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from pupil.tracking import warn
from pupil.tracking.mirror import Mirror
from pupil.tracking.store import address, connect, first_line, load_mlflow

PATIENCE, PATIENCE_UNANSWERED = 120.0, 8.0  # seconds, from the end of the training on
AGAIN = 30.0  # seconds after which a store that failed is asked again
INCOMPLETE = 3  # exit status


class Follower:
    """Pushes whenever there is news, at most about once a second."""

    def __init__(self, folder: Path, home: Path, experiment: str) -> None:
        self.folder, self.home, self.experiment = folder, home, experiment
        self.news, self.closing = threading.Event(), threading.Event()
        self.asked: float | None = None  # when the store was asked for the first time since it last failed, time.monotonic()
        self.answered = False
        self.failed = False  # and said so

    def listen(self) -> None:
        """In a thread of its own: news, then the end, then impatience."""
        while os.read(0, 4096):
            self.news.set()
        self.closing.set()
        self.news.set()
        closed = time.monotonic()
        while time.monotonic() < self.deadline(closed):
            time.sleep(0.1)
        os._exit(INCOMPLETE)  # the main thread waits for a store that does not answer

    def deadline(self, closed: float) -> float:
        if self.answered or self.asked is None or not address(self.home)[1]:
            return closed + PATIENCE
        return max(closed, self.asked) + PATIENCE_UNANSWERED

    def follow(self) -> bool:
        """Until the run is complete (True), or the record's writer is gone.  A store that fails is asked again later."""
        load_mlflow()
        mirror: Mirror | None = None
        while True:
            self.news.wait()
            self.news.clear()
            last = self.closing.is_set()  # before the push: it sees all that was written before the end
            try:
                mirror = mirror or self.connect()
                complete = mirror.push()
            except Exception as e:
                mirror = None  # what came through of the push, the next one finds out
                self.answered, self.asked = False, None
                if (
                    last and not (self.folder / "record.json").exists()
                ):  # nobody waits: the training was killed and its files removed
                    return False
                self.say(f"WARNING tracking is off: {first_line(e)}; training goes on, the store is asked again now and then")
                if last:
                    return False
                self.closing.wait(AGAIN)
                self.news.set()
                continue
            if complete or last:
                self.end(mirror, complete)
                return complete
            self.closing.wait(1)

    def connect(self) -> Mirror:
        self.asked = time.monotonic()
        store = connect(self.home, self.experiment)
        self.answered = True
        return Mirror(self.folder, store)

    def end(self, mirror: Mirror, complete: bool) -> None:
        if mirror.refused:
            warn(f"WARNING tracking: the store refuses {mirror.refused[0]}; {len(mirror.refused)} in all")
        elif not complete:
            mirror.abandon()

    def say(self, line: str) -> None:
        """Once: a store that is down for an hour is one fault."""
        if not self.failed:
            warn(line)
        self.failed = True


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the training, which then ends the record
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)  # the training goes first
    follower = Follower(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    threading.Thread(target=follower.listen, daemon=True).start()
    status = INCOMPLETE
    try:
        status = 0 if follower.follow() else INCOMPLETE
    except Exception as e:
        warn(f"WARNING tracking is off: {first_line(e)}; training goes on")
    sys.stderr.flush()
    os._exit(status)  # not waiting for threads that mlflow may have left


if __name__ == "__main__":
    main()
