"""This side of `follow`: the one process that mirrors the records of this one, as long as any of them grows."""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from weakref import WeakValueDictionary

EXIT = 5.0  # seconds for the end of a process that has answered for every record, or listens no more


class Child(subprocess.Popen[bytes]):
    """What it is told and what it answers: see `follow`.  It ends when nobody uses it any more."""

    def __init__(self, home: Path, experiment: str) -> None:
        source = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "pupil.tracking.follow", str(home), experiment]
        pipe = subprocess.PIPE
        super().__init__(command, bufsize=0, stdin=pipe, stdout=pipe, env={**os.environ, "PYTHONPATH": path})
        assert self.stdin
        assert self.stdout
        self.told, self.heard = self.stdin, self.stdout
        os.set_blocking(self.told.fileno(), False)  # a process that does not read holds up no training
        self.users, self.numbers = 0, count()
        self.answers: dict[int, bool] = {}
        self.awaited: set[int] = set()
        self.rest = b""  # of an answer that is not whole yet

    def open(self, folder: Path) -> int:
        """The number under which the record is known from now on."""
        number = next(self.numbers)
        self.users += 1
        self.awaited.add(number)
        self.tell("open", number, str(folder.absolute()))
        return number

    def tell(self, *event: str | int) -> bool:
        """Whether it could be told: it may have given up."""
        with contextlib.suppress(OSError, ValueError):
            return self.told.write(json.dumps(event).encode() + b"\n") is not None
        return False

    def end(self, number: int, seconds: float | None) -> bool | None:
        """Whether all of the record is in the store, once that is known; None where it takes longer than `seconds`."""
        try:
            return self.answer(number, seconds if self.tell("end", number) else EXIT)
        finally:
            self.leave()

    def answer(self, number: int, seconds: float | None) -> bool | None:
        deadline = None if seconds is None else time.monotonic() + seconds
        poll = select.poll()
        poll.register(self.heard, select.POLLIN)
        while number not in self.answers:
            if not poll.poll(None if deadline is None else max(0.0, 1000 * (deadline - time.monotonic()))):
                return None
            block = os.read(self.heard.fileno(), 4096)
            *lines, self.rest = (self.rest + block).split(b"\n")
            self.answers.update(json.loads(line) for line in lines)
            if not block:  # it is dead
                self.awaited.clear()
                return self.answers.get(number, False)
            self.awaited -= self.answers.keys()
        return self.answers[number]

    def leave(self) -> None:
        self.users -= 1
        if self.users == 0:
            self.let_go()
            if not self.awaited:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.wait(EXIT)

    def let_go(self) -> None:
        self.told.close()
        self.heard.close()


Key = tuple[Path, str]
CHILDREN: WeakValueDictionary[Key, Child] = WeakValueDictionary()  # those that may be told of new records
KEPT: dict[Key, list[Child]] = {}


def shared(home: Path, experiment: str) -> Child:
    """The one for this store: that of the other streams, or a new one."""
    key = home.resolve(), experiment
    found = CHILDREN.get(key)
    if found is None or found.told.closed or found.poll() is not None:
        found = CHILDREN[key] = Child(home, experiment)
        if key in KEPT:
            KEPT[key].append(found)
            found.users += 1
    return found


@contextmanager
def kept(home: Path, experiment: str) -> Iterator[None]:
    """Within, the process outlives its last stream: the next one takes it over."""
    key = home.resolve(), experiment
    mine = KEPT[key] = []
    try:
        yield
    finally:
        del KEPT[key]
        for one in mine:
            one.leave()


def forget() -> None:
    """In a fork, such as one that makes batches: it would keep the pipes open when the training is dead."""
    for one in list(CHILDREN.values()):
        one.let_go()


os.register_at_fork(after_in_child=forget)
