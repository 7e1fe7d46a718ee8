"""The same command goes on where it was killed.

Below .work/resume of the checkout, in a folder by the hash of what the training is:

    lock                who trains here now
    claim.json          uids of the records, when it began, and its folder if it was given none
    point.safetensors   everything to go on from

A training whose configuration, code, data, teacher, torch or kind of device is another one has another folder.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pupil import points
from pupil.distributed import world
from pupil.types import UserError

AGAIN = 75  # exit status of what was stopped and can go on: EX_TEMPFAIL
SHARE = 0.05  # of the time, at most, is spent on points
BESIDE = {  # modules that change no number of a training
    *("__main__", "adopt", "cards", "combinations", "doctor", "estimate", "faults", "figures", "inspection", "lineage"),
    *("machine", "opening", "places", "points", "progress", "recipes", "report", "resume", "rewrite", "room", "rows", "serve"),
    *("sealed", "similarity", "standalone", "tables", "tracking"),
}


class Stopped(Exception):
    """Asked to stop, with everything saved."""


class Keeper:
    """The folder of one training, while it runs."""

    def __init__(self, folder: Path, every: float) -> None:
        """`every`: seconds between two points; 0: after each step."""
        self.folder, self.every = folder, every
        self.point = folder / "point.safetensors"
        self.next, self.asked, self.resting = 0.0, "", False
        self.claim: dict[str, Any] = {}

    @contextmanager
    def holding(self, title: str) -> Iterator[None]:
        """Nobody else trains this meanwhile; what is left behind goes on from the last point, what ends well leaves nothing."""
        ended = self.folder.with_suffix(".ended")
        for left in self.folder.parent.glob("*.ended"):  # by what was killed while it removed that
            shutil.rmtree(left, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "a+") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not held on to by forked workers
            except OSError:
                lock.seek(0)
                raise UserError(
                    f"process {lock.read().strip() or '?'} is training this already ({title}); wait for it, or stop it and run"
                    " this command again: it goes on from there"
                ) from None
            if not (self.folder / "lock").exists():  # who held it has just removed it
                raise UserError(f"another process has just trained this ({title}); run this command again")
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
            yield
            self.folder.rename(ended)  # at once: half of it would be taken for a training that has just begun
            shutil.rmtree(ended, ignore_errors=True)

    def claimed(self, trainings: int, fresh: Callable[[], Path]) -> None:
        """What every attempt at this training has in common."""
        path = self.folder / "claim.json"
        with contextlib.suppress(OSError, ValueError):
            self.claim = json.loads(path.read_text())
        if len(self.claim.get("uids", ())) != trainings:
            uids = [uuid.uuid4().hex for _ in range(trainings)]
            self.claim = {"uids": uids, "started": time.time(), "folder": str(fresh())}
            path.with_suffix(".new").write_text(json.dumps(self.claim) + "\n")
            path.with_suffix(".new").replace(path)

    def load(self) -> dict[str, Any] | None:
        """The last point; a damaged one is set aside, and a line says so."""
        if not self.point.exists():
            return None
        try:
            return points.read(self.point)
        except UserError as e:
            aside = self.point.with_name("damaged.safetensors")
            self.point.replace(aside)
            say(f"WARNING {e}; it was set aside as {aside.name}, and training begins anew")
            return None

    def kept(self) -> str:
        return "the point before it is kept" if self.point.exists() else "there is no point yet to go on from"

    def due(self) -> bool:
        return bool(self.asked) or time.monotonic() >= self.next

    def save(self, tree: Mapping[str, Any]) -> bool:
        """A point; if it cannot be written the one before stays, and a line says so."""
        start = time.monotonic()
        try:
            points.write(self.point, tree)
            saved = True
        except OSError as e:
            saved = False
            say(f"WARNING {self.point} cannot be written: {e.strerror or str(e)[:120]}; {self.kept()}, and training goes on")
        now = time.monotonic()
        self.next = now + (max(self.every, (now - start) / SHARE) if self.every else 0)
        return saved

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM and SIGINT (Ctrl-C) are heard at the next step; a second one ends the process at once."""

        mine = os.getpid()

        def hear(number: int, frame: object) -> None:
            if os.getpid() != mine:  # a process that makes batches: it ends with this one
                return
            if self.resting:
                self.asked = signal.Signals(number).name
                self.stop(True)
            if not self.asked:
                say(f"{signal.Signals(number).name}: stopping after this step; once more: at once")
            elif world() == 1:  # torchrun sends its own after that of the terminal
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self.asked = signal.Signals(number).name

        before: dict[int, Any] = {}
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                before[number] = signal.signal(number, hear)
        except ValueError:  # not in the main thread, which hears for all
            pass
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def rest(self) -> None:
        """From here on all is saved, and whoever asks is answered at once."""
        self.resting = True
        self.stop(True)

    def stop(self, saved: bool) -> None:
        """Ends the training if it was asked to."""
        if self.asked:
            raise Stopped(
                f"stopped by {self.asked}, "
                + ("everything is saved: the same command goes on from here" if saved else self.kept())
            )


def key(facts: Any) -> str:
    """Of what makes a training what it is: `facts` (plain values), the code, own networks, torch."""
    digest = hashlib.sha256(json.dumps([facts, torch.__version__], sort_keys=True, default=str).encode())
    for path in code():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def code() -> list[Path]:
    """The files of this package, those aside that no training reads, and networks/."""
    package = Path(__file__).resolve().parent
    ours = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0].removesuffix(".py") not in BESIDE]
    return sorted([*ours, *(package.parents[1] / "networks").rglob("*.py")])


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
