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
INCOMPLETE = 3  # exit status


class Follower:
    """Pushes whenever there is news, at most about once a second."""

    def __init__(self, folder: Path, home: Path, experiment: str) -> None:
        self.folder, self.home, self.experiment = folder, home, experiment
        self.news, self.closing = threading.Event(), threading.Event()
        self.asked: float | None = None  # when the store was first asked, time.monotonic()
        self.answered = False

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

    def push(self) -> bool:
        """Until the run is complete (True), or the record's writer is gone."""
        load_mlflow()
        self.asked = time.monotonic()
        store = connect(self.home, self.experiment)
        self.answered = True
        mirror = Mirror(self.folder, store)
        while True:
            self.news.wait()
            self.news.clear()
            last = self.closing.is_set()  # before the push: it sees all that was written before the end
            complete = mirror.push()
            if complete or last:
                return complete
            self.closing.wait(1)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the training, which then ends the record
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)  # the training goes first
    follower = Follower(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    threading.Thread(target=follower.listen, daemon=True).start()
    status = INCOMPLETE
    try:
        status = 0 if follower.push() else INCOMPLETE
    except Exception as e:
        warn(f"WARNING tracking is off: {first_line(e)}; training goes on")
    sys.stderr.flush()
    os._exit(status)  # not waiting for threads that mlflow may have left


if __name__ == "__main__":
    main()
