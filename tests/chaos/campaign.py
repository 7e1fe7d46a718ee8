"""One kind after another: trained in peace, then killed again and again, and compared."""

import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.chaos.blows import Blow, Sight, draw, holder, strike, wait_for
from tests.chaos.compare import differences, traces, uids, untracked
from tests.chaos.kinds import Kind
from tests.chaos.lab import Going, Lab

STOPPED = 75
UNHEARD = (-9, -15, -2, 130)  # killed, or asked to stop before it listens
HEAD = "| kind | killed | attempts | s to stop, at most | equal to the bit |\n|---|---|---:|---:|---|"


class Killed(NamedTuple):
    """A blow, and what came of it."""

    blow: Blow
    place: str  # the last point then
    status: int
    seconds: float  # until it had ended

    def __str__(self) -> str:
        return f"{self.blow}, {self.blow.moment} ({self.place}): {self.status}"


class Report(NamedTuple):
    """A kind's fate."""

    kind: str
    kills: list[Killed]
    attempts: int
    wrong: list[str]  # files that differ from those of the uninterrupted run, and what else is not as promised

    def __str__(self) -> str:
        slowest = max((kill.seconds for kill in self.kills), default=0)
        kills = "; ".join(map(str, self.kills))
        return f"| {self.kind} | {kills} | {self.attempts} | {slowest:.1f} | {', '.join(self.wrong) or 'yes'} |"


class Siege:
    """Of one kind, in a lab."""

    def __init__(self, lab: Lab, kind: Kind) -> None:
        self.lab, self.kind = lab, kind
        below = "runs/" + "".join(c if c.isalnum() else "_" for c in kind.name)
        model, record = f"{below}/model", f"{below}/record"
        if kind.by == "dvc":
            model, record = (f"out/{part}/distill/resnet8-resnet8/{kind.method}/0" for part in ("models", "records"))
        self.places, self.folders = (f"out={model}", f"record={record}"), [lab.path / model, lab.path / record]
        self.sight = Sight(lab, self.folders)
        self.kills: list[Killed] = []
        self.wrong: list[str] = []
        self.attempts = 0

    def run(self, kills: int, dice: random.Random, blows: Sequence[Blow] = ()) -> Report:
        """So many kills: `blows`, or what the dice say."""
        self.lab.run(self.kind.stage, *self.kind.arguments, *self.places)
        self.expected = traces(self.folders)
        if len(uids(self.folders)) != self.kind.models:
            self.wrong.append("it does not leave the models that it should")
        self.clean()
        for _ in range(3 * kills):
            if len(self.kills) < kills:
                self.attempt(blows[len(self.kills)] if blows else draw(dice, self.kind.by))
        if len(self.kills) < kills:
            self.wrong.append(f"{len(self.kills)} kills of {kills}: it always ended before")
        self.last()
        self.clean()
        return Report(self.kind.name, self.kills, self.attempts, self.wrong)

    def attempt(self, blow: Blow) -> None:
        going = self.start(blow.every)
        if not wait_for(blow, going, self.sight):
            self.ended(going)
            return
        hit = time.monotonic()
        strike(blow, going, self.sight)
        status = going.wait()
        self.kills.append(Killed(blow, self.sight.where(), status, time.monotonic() - hit))
        self.ended(going)

    def ended(self, going: Going) -> None:
        """An attempt, in one of the ways that are allowed."""
        if self.kind.by == "dvc":  # which has statuses of its own
            return
        if going.status == 0 or (self.sight.place() is None and self.sight.finished()):  # and was hit on its way out
            self.look()
            self.clean()
        elif going.status == STOPPED:
            if "the same command goes on" not in going.said:
                self.wrong.append(f"stopped without a word: {last(going)}")
        elif going.status not in UNHEARD and self.kind.by != "exec":
            self.wrong.append(f"status {going.status}: {last(going)}")

    def last(self) -> None:
        """Runs it to its end.  What dvc has left behind may still train: then it is refused, and tried again later."""
        for _ in range(3):
            while self.kind.by == "dvc" and (pid := holder(self.sight)) and Path(f"/proc/{pid}").exists():
                time.sleep(0.05)
            claimed = self.sight.claimed()
            going = self.start(0)
            if going.wait() == 0:
                break
            if self.kind.by != "dvc":
                self.wrong.append(f"status {going.status}: {last(going)}")
                return
        else:
            self.wrong.append(f"dvc does not end well: {last(going)}")
            return
        if claimed and sorted(claimed) != uids(self.folders):
            self.wrong.append("another record")
        self.look()
        if self.kind.tracked:
            self.wrong += untracked(self.lab.clone, self.folders)

    def look(self) -> None:
        """What is not as it should be after an attempt that ended well."""
        self.wrong += differences(self.expected, traces(self.folders))
        if left := [path for path in self.lab.resume.glob("*") if path.suffix != ".ended"]:
            self.wrong.append(f"{left[0].name} is left in .work/resume")

    def start(self, every: float) -> Going:
        self.attempts += 1
        if self.kind.by != "dvc":
            arguments = (*self.kind.arguments, *self.places, f"resume_every={every}")
            return self.lab.start(self.kind.stage, *arguments, tracked=self.kind.tracked, anew=self.kind.by == "exec")
        self.lab.clone.edit({"resume_every": every})
        return self.lab.command("dvc", "repro", "--no-run-cache", "-s", f"distill@resnet8-resnet8-{self.kind.method}-0")

    def clean(self) -> None:
        for folder in (*self.folders, self.lab.resume):
            shutil.rmtree(folder, ignore_errors=True)
        self.lab.clone.remove("dvc.lock")


def last(going: Going) -> str:
    return (going.said.strip().splitlines() or ["it said nothing"])[-1][:300]
