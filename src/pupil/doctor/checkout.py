"""The checkout: whose code runs, git, DVC, and what killed processes have left."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pupil.doctor.finding import SETUP, Finding

OLD = 30 * 24 * 3600  # seconds


def code(root: Path) -> Iterator[Finding]:
    """Another checkout's code, or a file of the working folder, may be imported in the place of what is meant."""
    import pupil

    ours = Path(str(pupil.__file__)).resolve().parents[2]
    here = next((p for p in (Path.cwd(), *Path.cwd().parents) if (p / "src/pupil/__init__.py").exists()), root).resolve()
    from_variable = str(ours / "src") in os.environ.get("PYTHONPATH", "").split(os.pathsep)
    mend = "unset PYTHONPATH" if from_variable else SETUP
    yield Finding("code", f"pupil is that of {ours}{'' if ours == here else f', not of {here}'}", "" if ours == here else mend)
    for name in ("torch", "numpy", "safetensors", "mlflow", "dvc", "hydra", "random", "types"):
        for shadow in (Path.cwd() / f"{name}.py", *(Path(p) / f"{name}.py" for p in python_path())):
            if shadow.is_file():
                yield Finding(
                    "code", f"{shadow} is imported instead of {name}", f"mv {shadow} {shadow.with_stem(f'my_{name}')}"
                )


def python_path() -> list[str]:
    return [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]


def git(root: Path) -> Iterator[Finding]:
    if shutil.which("git") is None:
        yield Finding("git", "not installed: records cannot name the commit", "sudo apt-get install git")
        return
    done = asked(root, "rev-parse", "--short", "HEAD")
    if "dubious ownership" in done.stderr:
        yield Finding("git", f"{root} belongs to somebody else", f"git config --global --add safe.directory {root}")
    elif "not a git repository" in done.stderr:
        yield Finding(
            "git", f"{root} is no checkout: records cannot name the commit", "git init && git add -A && git commit -m start"
        )
    elif done.returncode:
        yield Finding("git", "there is no commit yet", "git add -A && git commit -m start")
    else:
        changed = asked(root, "status", "--porcelain", "--untracked-files=no").stdout.splitlines()
        unmerged = [line for line in changed if "U" in line[:2] or line[:2] in ("AA", "DD")]
        said = f"commit {done.stdout.strip()}, {len(changed)} files changed since"
        yield Finding(
            "git", f"{said}, {len(unmerged)} in conflict" if unmerged else said, "git merge --abort" if unmerged else ""
        )


def asked(root: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    plain = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=30, env=plain)


def dvc(root: Path) -> Iterator[Finding]:
    """The command, the repository, and that its stages start the Python that is asked here."""
    command, interpreter = shutil.which("dvc"), shutil.which("python")
    if command is None:
        yield Finding("DVC", "the command dvc is not on the PATH", "make setup && source .venv/bin/activate")
    elif not (root / ".dvc").is_dir():
        yield Finding("DVC", f"{root} is not initialised", "dvc init")
    elif not (root / "dvc.yaml").is_file():
        yield Finding("DVC", "dvc.yaml is not there", "git checkout dvc.yaml")
    else:
        yield Finding("DVC", f"{command}, initialised")
    if interpreter is None or not Path(interpreter).parent.samefile(Path(sys.executable).parent):
        said = f"stages would be started with {interpreter or 'no python at all'}, this is {sys.executable}"
        yield Finding("DVC", said, "source .venv/bin/activate")


def locks(root: Path) -> Iterator[Finding]:
    """DVC's; it forgets processes that are gone, unless another has their number by now."""
    path, stale = root / ".dvc/tmp/rwlock", "rm .dvc/tmp/rwlock"
    try:
        held: Any = json.loads(path.read_text()) if path.exists() else {}
        readers = [one for group in held.get("read", {}).values() for one in group]
        holders = {int(one["pid"]) for one in (*readers, *held.get("write", {}).values())}
    except (ValueError, KeyError, TypeError, AttributeError):
        yield Finding("locks", "DVC's lock .dvc/tmp/rwlock is damaged", stale)
        return
    alive = {pid: command(pid) for pid in sorted(holders) if Path(f"/proc/{pid}").exists()}
    if foreign := [pid for pid, words in alive.items() if "dvc" not in words]:
        yield Finding("locks", f"DVC's lock names process {foreign[0]}, which is no DVC any more", stale)
    elif alive:
        yield Finding("locks", f"DVC is at work here: process {', '.join(map(str, alive))}")
    else:
        yield Finding("locks", "nobody holds DVC's lock")


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def points(root: Path) -> Iterator[Finding]:
    """What interrupted trainings have left below .work, to go on from."""
    folder = root / ".work/resume"
    found = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    busy = [p for p in found if held(p / "lock")]
    left = [p for p in found if p not in busy]
    old = [p for p in left if time.time() - newest(p) > OLD]
    damaged = [p for p in left if (p / "damaged.safetensors").exists()]
    size = sum(f.stat().st_size for p in left for f in p.rglob("*") if f.is_file())
    said = f"{len(left)} of interrupted trainings, {size / 1e6:,.0f} MB: the same command goes on from them"
    about = [f"{len(busy)} trainings are running"] * bool(busy) + [said if left else "none"]
    yield Finding("resume points", "; ".join(about))
    for what, which in (("are older than 30 days", old), ("were damaged and set aside", damaged)):
        if which:
            names = " ".join(str(p.relative_to(root)) for p in which)
            yield Finding("resume points", f"{len(which)} {what}", f"rm -r {names}")


def held(lock: Path) -> bool:
    try:
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def newest(path: Path) -> float:
    """When anything in it was last written, seconds since 1970."""
    return max(p.stat().st_mtime for p in (path, *path.rglob("*")))
