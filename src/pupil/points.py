"""Points that a killed training goes on from: one file, valid or absent; no pickle.

A safetensors file whose metadata holds everything that is no tensor as JSON, and the SHA-256 of all of it.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pupil.types import UserError

FORMAT = 1


def write(path: Path, tree: Mapping[str, Any]) -> None:
    """`tree`: nested dicts and lists of tensors and plain values.  The file that was there stays until the new one is whole.

    OSError where it cannot be written.
    """
    tensors: list[Tensor] = []
    text = json.dumps([FORMAT, pack(tree, tensors)])
    named = {f"{i:06}": tensor for i, tensor in enumerate(tensors)}
    new = path.with_name(path.name + ".new")
    try:
        save_file(named, new, {"facts": text, "sha256": digest(text, named)})
        flush(new)
        new.replace(path)
        flush(path.parent)
    except SafetensorError as e:  # it wraps what the system says
        new.unlink(missing_ok=True)
        raise OSError(str(e)) from None
    except OSError:
        new.unlink(missing_ok=True)
        raise


def read(path: Path) -> dict[str, Any]:
    """What `write` was given, on the CPU; UserError where the file is not whole."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            named = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if digest(about["facts"], named) != about["sha256"]:
            raise ValueError("its SHA-256 is another one")
        version, tree = json.loads(about["facts"])
        if version != FORMAT:
            raise ValueError(f"it has format {version}, this is {FORMAT}")
        return unpack(tree, list(named.values()))
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is damaged ({' '.join(str(e).split())[:100]})") from None


def parse(raw: bytes) -> dict[str, Any]:
    """As `read`, of a file's content."""
    with tempfile.TemporaryDirectory() as folder:  # safetensors gives the metadata of files alone
        path = Path(folder) / "point.safetensors"
        path.write_bytes(raw)
        return read(path)


def pack(value: Any, tensors: list[Tensor]) -> Any:
    """As JSON; a tensor becomes its place in `tensors`, and a dict a list of pairs, for its keys may be numbers."""
    if isinstance(value, Tensor):
        tensors.append(value.detach().cpu().clone(memory_format=torch.contiguous_format))
        return {"tensor": len(tensors) - 1}
    if isinstance(value, Mapping):
        return {"dict": [[key, pack(v, tensors)] for key, v in value.items()]}
    return [pack(v, tensors) for v in value] if isinstance(value, list | tuple) else value


def unpack(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, list):
        return [unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    return tensors[value["tensor"]] if "tensor" in value else {key: unpack(v, tensors) for key, v in value["dict"]}


def digest(text: str, named: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256(text.encode())
    for name, tensor in named.items():
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return sha.hexdigest()


def flush(path: Path) -> None:
    """To the disk, not only to the system's memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
