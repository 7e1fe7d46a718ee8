"""Starts stages without importing everything anew: python zygote.py, with the clone's src in PYTHONPATH.

A line of JSON on standard input, [script, arguments, folder of the output, tracked], starts a process that runs the script
as `python script arguments` would, leads a process group of its own, and leaves its status in the folder's file `status`.
It has imported what this process had, and nothing else is different.
"""

import json
import os
import runpy
import signal
import sys
from pathlib import Path


def main() -> None:
    import matplotlib.figure  # noqa: F401
    import torch

    import pupil.assemble
    import pupil.session  # noqa: F401
    from pupil import config  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        script, arguments, folder, tracked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            status = watch(script, arguments, Path(folder), tracked)
            (Path(folder) / "status.new").write_text(str(status))
            (Path(folder) / "status.new").replace(Path(folder) / "status")
            os._exit(0)
        while pid not in (0, -1):  # those that have ended
            try:
                pid = os.waitpid(-1, os.WNOHANG)[0]
            except ChildProcessError:
                pid = -1


def watch(script: str, arguments: list[str], folder: Path, tracked: bool) -> int:
    """The exit status of the stage, negative for a signal, as of subprocess."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        (folder / "pid.new").write_text(str(os.getpid()))
        (folder / "pid.new").replace(folder / "pid")
        stage(script, arguments, folder, tracked)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def stage(script: str, arguments: list[str], folder: Path, tracked: bool) -> None:
    out = os.open(folder / "out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not tracked:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # as where it is not installed
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    sys.exit(0)


if __name__ == "__main__":
    main()
