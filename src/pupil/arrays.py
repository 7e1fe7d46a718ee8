"""Arrays on disk: safetensors, readable by whoever may read the folder."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pupil.types import UserError


def save_arrays(path: Path, arrays: Mapping[str, Tensor]) -> None:
    """Writes a temporary file and renames it; safetensors alone makes files that only their owner can read.

    OSError where it cannot be written; what was there before stays.
    """
    new = path.with_name(path.name + ".new")
    try:
        new.touch()
        mode = new.stat().st_mode
        save_file({key: value.contiguous() for key, value in arrays.items()}, new)
        new.chmod(mode)
        new.replace(path)
    except (SafetensorError, OSError) as e:
        new.unlink(missing_ok=True)
        raise e if isinstance(e, OSError) else refused(e, path) from None


def load_arrays(path: Path, *needed: str) -> dict[str, Tensor]:
    """UserError where the file is damaged or lacks what is needed."""
    try:
        found = load_file(path)
    except SafetensorError as e:
        raise UserError(f"{path} is damaged ({str(e)[:100]}); delete {path.parent} and run dvc repro") from None
    if missing := [name for name in needed if name not in found]:
        raise UserError(f"{path} is damaged: it holds no {missing[0]}; delete {path.parent} and run dvc repro")
    return found


def refused(e: SafetensorError, path: Path) -> Exception:
    """It wraps what the system says: "I/O error: No space left on device (os error 28)"."""
    code = re.search(r"os error (\d+)", str(e))
    return OSError(int(code[1]), os.strerror(int(code[1])), str(path)) if code else e
