"""Stage scripts and `python -m pupil` as a user types them, in this process and in a folder that stands for the checkout."""

import runpy
import shlex
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

STAGES = Path(__file__).resolve().parents[1] / "stages"


def at_home(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`root` is the working folder and the home of `pupil`."""
    monkeypatch.chdir(root)
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "pupil":
            for where in ("ROOT", "HOME"):
                if hasattr(module, where):
                    monkeypatch.setattr(module, where, root)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "DVC_STAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "path", list(sys.path))


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of `python stages/<word>.py ...` or of `python -m pupil <word> ...`, in this process."""
    word, *args = shlex.split(line)
    script = STAGES / f"{word}.py"
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", [str(script) if script.exists() else "pupil", *([] if script.exists() else [word]), *args])
    status: object = 0
    try:
        if script.exists():
            runpy.run_path(str(script), run_name="__main__")
        else:
            runpy.run_module("pupil", run_name="__main__")
    except SystemExit as end:
        status = end.code
    GlobalHydra.instance().clear()
    assert isinstance(status, int)
    return status
