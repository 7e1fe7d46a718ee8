"""When and how a training is hit."""

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from pupil import points
from pupil.types import UserError
from tests.chaos.lab import Going, Lab

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)  # half of them cannot be heard
MOMENTS = ("start", "step", "step", "writing", "epoch", "results", "end")


class Blow(NamedTuple):
    number: signal.Signals
    target: str  # stage | group (as the terminal's Ctrl-C) | dvc | both
    moment: str
    count: int  # of the moment
    later: float  # seconds after it
    every: float  # resume_every of the attempt

    def __str__(self) -> str:
        to = {"stage": "", "group": " to the group", "dvc": " to dvc", "both": " to dvc and the stage"}[self.target]
        return f"{self.number.name}{to}"


def draw(dice: random.Random, by: str = "fork") -> Blow:
    moment, number = dice.choice(MOMENTS), dice.choice(SIGNALS)
    target = dice.choice(("stage", "dvc", "both", "group")) if by == "dvc" else dice.choice(("stage", "stage", "group"))
    later = {"start": dice.uniform(0, 0.6), "step": dice.uniform(0, 0.03), "results": dice.uniform(0, 0.8)}.get(moment, 0)
    return Blow(number, target, moment, dice.randint(1, 6), later, dice.choice((0, 0, 0.15)))


class Sight:
    """What can be seen of a training from outside."""

    def __init__(self, lab: Lab, folders: Sequence[Path]) -> None:
        """`folders`: of its results."""
        self.lab, self.folders = lab, folders

    def files(self, pattern: str) -> list[Path]:
        return [path for folder in self.folders for path in folder.rglob(pattern)]

    def place(self) -> Path | None:
        """Its folder below .work/resume."""
        return next((p for p in self.lab.resume.glob("*") if p.suffix != ".ended" and (p / "lock").exists()), None)

    def point(self) -> tuple[int, int] | None:
        place = self.place()
        with contextlib.suppress(OSError):
            found = (place / "point.safetensors").stat() if place else None
            return None if found is None else (found.st_ino, found.st_mtime_ns)
        return None

    def writing(self) -> bool:
        place = self.place()
        return place is not None and (place / "point.safetensors.new").exists()

    def lines(self) -> int:
        with contextlib.suppress(OSError):
            return sum(path.read_bytes().count(b"\n") for path in self.files("metrics.jsonl"))
        return 0

    def results(self) -> int:
        return sum(len(self.files(pattern)) for pattern in ("*.png", "*.safetensors", "*.safetensors.new"))

    def finished(self) -> bool:
        with contextlib.suppress(OSError):
            return any('"FINISHED"' in path.read_text() for path in self.files("record.json"))
        return False

    def claimed(self) -> list[str]:
        """The uids of its records, once it has them."""
        with contextlib.suppress(OSError, ValueError):
            place = self.place()
            return json.loads((place / "claim.json").read_text())["uids"] if place else []
        return []

    def where(self) -> str:
        """The last point, in words."""
        place = self.place()
        if place is None:
            return "not begun, or ended"
        if not (place / "point.safetensors").exists():
            return "no point yet"
        try:
            tree = points.read(place / "point.safetensors")
        except UserError as e:  # what dvc has left behind may still train
            return str(e) if (place / "point.safetensors").exists() else "ended by itself"
        phase, epoch, _, step = tree["states"][0]["place"]
        group = f"seed {tree['group']}, " if tree["group"] else ""
        return f"{group}phase {phase + 1}, epoch {epoch}, step {step}"


def wait_for(blow: Blow, going: Going, sight: Sight) -> bool:
    """Until the moment; False where the process has ended before."""
    seen: object = sight.point()
    count, lines, known = 0, sight.lines(), sight.results()

    def come() -> bool:
        nonlocal count, seen
        if blow.moment == "start":
            return going.pid is not None
        if blow.moment == "step":
            now = sight.point()
            count += now is not None and now != seen
            seen = now if now is not None else seen
            return count >= blow.count
        if blow.moment == "writing":
            now = sight.writing()
            count += now and seen is not True
            seen = now
            return count >= blow.count
        if blow.moment == "epoch":
            return sight.lines() > lines
        return sight.results() > known if blow.moment == "results" else sight.finished()

    return until(come, going) and until_later(blow.later, going)


def until(come: Callable[[], bool], going: Going, seconds: float = 240) -> bool:
    end = time.monotonic() + seconds
    while not come():
        if going.status is not None:
            return False
        assert time.monotonic() < end, f"the moment did not come in {seconds} s\n{going.said}"
        time.sleep(0.0005)
    return True


def until_later(seconds: float, going: Going) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.0005)
    return going.status is None


def holder(sight: Sight) -> int | None:
    """The process that trains, below another one; what is in the file may be long gone."""
    place = sight.place()
    with contextlib.suppress(OSError, ValueError):
        pid = int((place / "lock").read_text()) if place else 0
        return pid if b"stages/" in Path(f"/proc/{pid}/cmdline").read_bytes() else None
    return None


def strike(blow: Blow, going: Going, sight: Sight) -> None:
    assert going.pid is not None
    with contextlib.suppress(ProcessLookupError):
        if blow.target == "group":
            os.killpg(going.pid, blow.number)
        if blow.target in ("stage", "both"):
            os.kill(holder(sight) or going.pid, blow.number)
        if blow.target in ("dvc", "both"):
            os.kill(going.pid, blow.number)
