"""A trained network on disk: model.safetensors and model.json, enough to build it again; no pickle.

model.json: network, classes (names), image_size, mean, std (of pixels in 0..1), method and surgery (None and {} for a
network alone), preprocessing (in words), epoch, selection, metrics, data digest, the teacher's network and hash, SHA-256 of
the weights.  Both files are functions of the training alone (no time, no path), so that DVC sees equal trainings as equal.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pupil import facts
from pupil.arrays import save_arrays
from pupil.methods import METHODS
from pupil.models import NETWORKS, build
from pupil.models.external import is_external, refuse_code
from pupil.net import Net
from pupil.record import sha256
from pupil.sealed import read_sealed, write_sealed
from pupil.types import UserError

WEIGHTS, META = "model.safetensors", "model.json"
KINDS: Mapping[str, Callable[[Any], bool]] = {  # what is needed to build it again and to use it
    "network": lambda x: isinstance(x, str),
    "method": lambda x: x is None or isinstance(x, str),
    "surgery": lambda x: isinstance(x, dict),
    "sha256": lambda x: isinstance(x, str),
    **facts.IMAGES,
}

PREPROCESSING = {
    "resize": "upright (EXIF), RGB, the centre square resized to image_size x image_size pixels, bilinear, antialiased",
    "values": "pixels of 0 to 255 divided by 255, minus mean, divided by std; mean and std are per channel R, G, B",
    "input": "(batch, 3, image_size, image_size), float32",
}
RESIZED = PREPROCESSING | {
    "resize": "upright (EXIF), RGB, the shorter side resized to image_size * 256 / 224 pixels, bilinear, antialiased, and the"
    " centre of image_size x image_size pixels cut out"
}


def seen(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What model.json says of the prepared data: how an image becomes what the network sees, and what its outputs are."""
    facts = {key: manifest[key] for key in ("classes", "image_size", "mean", "std")}
    resized = manifest["augment"]["crop"] == "resized"
    return facts | ({"crop": "resized", "preprocessing": RESIZED} if resized else {})


def save(folder: Path, state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """`state`: a state dict of the deployed network."""
    folder.mkdir(parents=True, exist_ok=True)
    save_arrays(folder / WEIGHTS, state)
    full = {"format": 1, "preprocessing": PREPROCESSING, **meta, "sha256": sha256(folder / WEIGHTS)}
    write_sealed(folder / META, full)


def read_meta(folder: Path) -> dict[str, Any]:
    """model.json; its network and method are in the tables."""
    try:
        meta = read_sealed(folder / META)
    except FileNotFoundError:
        raise UserError(
            f"no trained network in {folder}: {META} is not there; train it first (dvc repro) or give its folder"
        ) from None
    except ValueError as e:  # not JSON, not even text, or not what was written
        why = str(e) if "checksum" in str(e) else "it is not JSON"
        raise UserError(f"{folder / META} is damaged: {why}; delete {folder} and run dvc repro") from None
    if not isinstance(meta, dict) or KINDS.keys() - meta.keys():
        raise UserError(f"{folder / META} is damaged: it lacks what describes a network; delete {folder} and run dvc repro")
    if key := facts.wrong(meta, KINDS):
        said = json.dumps(meta[key])[:100]
        raise UserError(f"{folder / META} is damaged: its {key} is {said}; delete {folder} and run dvc repro")
    known = meta["network"] in (*NETWORKS,) or is_external(str(meta["network"]))
    if not known or meta["method"] not in (None, *METHODS):
        raise UserError(f"{folder / META} names network {meta['network']!r}, method {meta['method']!r}: not known here")
    return meta


def load(folder: Path) -> tuple[Net, dict[str, Any]]:
    """The network in eval mode on the CPU, without gradients, and its metadata."""
    meta = read_meta(folder)
    weights = folder / WEIGHTS
    if not weights.exists():
        raise UserError(f"{weights} is missing; delete {folder} and run dvc repro")
    if sha256(weights) != meta["sha256"]:
        raise UserError(f"{weights} is damaged: its SHA-256 is not that of {META}; delete {folder} and run dvc repro")
    refuse_code(meta["network"], folder)
    try:
        state = load_file(weights)
        if meta["network"] in NETWORKS:
            with torch.device("meta"):  # a description that asks for more than the file holds must not fill the memory
                rebuilt(meta).load_state_dict(state, assign=True)
        net = rebuilt(meta)
        net.load_state_dict(state)
    except UserError:
        raise
    except (SafetensorError, RuntimeError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        said = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"{weights} does not fit the {meta['network']} of {META}: {said}") from None
    return net.eval().requires_grad_(False), meta


def rebuilt(meta: Mapping[str, Any]) -> Net:
    net = build(meta["network"], len(meta["classes"]), meta["image_size"])
    return net if meta["method"] is None else METHODS[meta["method"]].deployed(net, **meta["surgery"])
