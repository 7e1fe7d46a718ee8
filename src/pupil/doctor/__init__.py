"""`python -m pupil doctor`: what of this machine and this checkout does not work, and the command that mends it.

Every check is a function that gives findings; it imports what it looks at inside, so that the doctor works where torch, mlflow,
hydra or dvc are missing or broken.  It writes nothing but files that it removes at once.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pupil.doctor import checkout, machine, packages, places, store
from pupil.doctor.finding import Finding

Check = Callable[[Path], Iterable[Finding]]
CHECKS: tuple[Check, ...] = (
    *(packages.python, packages.packages, packages.dali),
    *(checkout.code, machine.gpu, machine.threads, machine.memory, machine.shared_memory),
    *(places.writable, places.space, checkout.git, checkout.dvc, checkout.locks, checkout.points, store.store),
)


def doctor(root: Path) -> int:
    """Prints a line for each finding about the checkout `root`; 1 if something must be mended, else 0."""
    wrong = 0
    try:
        for finding in examine(root):
            print(finding.line, flush=True)
            wrong += bool(finding.mend)
        print(f"{wrong} to be mended" if wrong else "nothing is wrong", flush=True)
    except BrokenPipeError:  # whoever read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return min(wrong, 1)


def examine(root: Path) -> Iterator[Finding]:
    """A check that breaks is a finding, and the others go on."""
    for check in CHECKS:
        about = check.__name__.replace("_", " ")
        try:
            yield from check(root)
        except Exception as e:  # whatever a broken machine leads to
            yield Finding(about, f"cannot be examined ({type(e).__name__}: {e})", "mend what else is wrong, then look again")
