"""Checkpoint files from elsewhere, read without running anything in them.

A file of torch.save is read with weights_only=True and a short allow-list (argparse.Namespace, numpy's scalars);
whatever else it names is refused.
"""

import re
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pupil.types import UserError

Raw = tuple[Mapping[Any, Any], str | None]  # what was saved, and the network that it names


class Forgotten:
    """Stands for numpy's dtypes and scalars (an accuracy that a checkpoint carries): nothing of numpy is run."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


NUMPY = ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # of numpy 1 and 2


def read_untrusted(path: Path) -> Raw:
    """What a .pth, .pt, .tar, .model or .safetensors file holds."""
    if path.is_dir():
        raise UserError(
            f"{path} is a folder, expected a file; the folder of a model can teach as it is: distill.checkpoint={path}"
        )
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    if not start:
        raise UserError(f"{path} is empty; download it again")
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path, start)


def read_safetensors(path: Path) -> Raw:
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            return {key: file.get_tensor(key) for key in file.keys()}, about.get("network", about.get("arch"))  # noqa: SIM118
    except SafetensorError as e:
        raise UserError(f"{path} is truncated, damaged or no safetensors file ({clip(e)}); download it again") from None


def read_torch(path: Path, start: bytes) -> Raw:
    """What torch.save wrote, and the network that it names."""
    for sign, kind in ((b"<", "a web page"), (b"version https://git-lfs", "a pointer of Git LFS")):
        if start.lstrip().startswith(sign):
            raise UserError(f"{path} is {kind}, not the checkpoint itself; download that")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                    raise UserError(f"{path} unpacks to more than its size, which no file of torch.save does; it is not read")
        with torch.serialization.safe_globals([Namespace, *((Forgotten, name) for name in NUMPY)]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            raw = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as e:  # whatever a damaged or hostile file leads to
        if culprit := re.search(r"GLOBAL (\S+)", str(e)):
            raise UserError(
                f"{path} names {clip(culprit[1])}, which weights do not need; nothing of the file was run."
                " Save the network's state_dict() alone where the file comes from"
            ) from None
        reason = str(e).split("WeightsUnpickler error: ")[-1].strip() or type(e).__name__
        raise UserError(f"{path} is truncated, damaged or no checkpoint ({clip(reason)}); download it again") from None
    if not isinstance(raw, Mapping):
        raise UserError(f"{path} holds one {clip(type(raw).__name__)}, expected a dict of tensors")
    options = raw.get("opt")
    told = vars(options) if isinstance(options, Namespace) else {}
    names = (raw.get("arch"), told.get("model_s"), told.get("model"))
    return raw, next((name for name in names if isinstance(name, str)), None)


def clip(text: object) -> str:
    """A text out of a file, fit for one line of a terminal."""
    line = "".join(c if c.isprintable() else "?" for c in str(text).split("\n")[0])
    return line if len(line) <= 120 else line[:117] + "..."
