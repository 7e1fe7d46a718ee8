"""Arrays on disk: safetensors, readable by whoever may read the folder."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


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
    except SafetensorError as e:  # it wraps what the system says
        new.unlink(missing_ok=True)
        raise OSError(None, str(e), str(path)) from None
    except OSError:
        new.unlink(missing_ok=True)
        raise
