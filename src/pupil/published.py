"""Checkpoints of published code: their layouts, and their tensors matched with a network.

The layouts (where the weights lie, which prefixes their keys have) are those of RepDistiller, SimKD, HeadSharingKD,
spot-adaptive KD, CSKD, REFILLED and mdistiller; any other file may hold a plain state dict, as torchvision's do.
"""

from collections.abc import Mapping, Set
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pupil.models import NETWORKS, build, published_key
from pupil.models.taps import native_state
from pupil.net import Net
from pupil.settings import nearest as suggestion
from pupil.types import UserError
from pupil.untrusted import clip, read_untrusted

LAYOUTS = (  # name, where the weights are, what must be beside them; the first that fits
    ("SimKD", "model", {"proj"}),
    ("spot-adaptive", "model", {"policy"}),
    ("spot-adaptive", "model", {"acc"}),
    ("RepDistiller", "model", {"opt"}),
    ("RepDistiller", "model", {"accuracy"}),
    ("RepDistiller or SimKD", "model", {"best_acc"}),
    ("mdistiller or RepDistiller", "model", set()),
    ("REFILLED", "state_dict", {"validating_accuracy"}),
    ("CSKD", "state_dict", {"err"}),
    ("dict with state_dict", "state_dict", set()),
)
COUNTER = "num_batches_tracked"


class Published(NamedTuple):
    """What a file holds."""

    layout: str
    state: dict[str, Tensor]  # of the network, under the authors' keys
    beside: dict[str, dict[str, Tensor]]  # other modules' tensors: `proj`, `t_head`, `teacher`, ...
    others: list[str]  # what else is in the file: optimizer, epoch, ...
    named: str | None  # the architecture, if the file says so
    data: str | None = None  # the data set, if the file says so


class Fit(NamedTuple):
    """A state dict held against a network of the table."""

    network: str
    classes: int
    state: dict[str, Tensor]  # the file's tensors under our keys
    counters: int  # batch norms whose counter the file lacks; they start at 0
    wrong: list[str]  # missing, left over or of another shape: one text each


def read(path: Path) -> Published:
    """The network in a .pth, .pt, .tar, .model or .safetensors file."""
    raw, named = read_untrusted(path)
    return unwrap(path, raw, named)


def unwrap(path: Path, raw: Mapping[Any, Any], named: str | None) -> Published:
    """Takes layouts and prefixes off."""
    fits = (row for row in LAYOUTS if isinstance(raw.get(row[1]), Mapping) and row[2] <= raw.keys())
    layout, where, _ = next(fits, ("plain state dict", None, None))
    state = tensors(path, raw if where is None else raw[where])
    beside, others = {}, []
    for key, value in raw.items() if where is not None else ():
        if isinstance(value, Mapping) and value and all(isinstance(v, Tensor) for v in value.values()):
            beside |= {} if key == where else {clip(key): tensors(path, value)}
        else:
            others.append(clip(key))
    for prefix, theirs in (("student.", "mdistiller"), ("model_s.", "HeadSharingKD")):
        if any(key.startswith(prefix) for key in state):
            layout = theirs
            for key in [key for key in state if not key.startswith(prefix)]:
                module, _, rest = key.partition(".")
                beside.setdefault(clip(module), {})[rest] = state.pop(key)
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    data = getattr(raw.get("opt"), "dataset", None)
    return Published(layout, state, beside, others, named, data if isinstance(data, str) else None)


def part_of(file: Path, found: Published, part: str) -> Published:
    """Another module of the file instead of its network, such as mdistiller's `teacher`."""
    if part not in found.beside:
        there = ", ".join(found.beside) or "nothing beside its network"
        raise UserError(f"--part: {file} holds no {part!r}; it holds {there}")
    rest = {name: tensors for name, tensors in found.beside.items() if name != part}
    return found._replace(state=found.beside[part], beside={"network": found.state, **rest}, named=None)


def tensors(path: Path, found: Mapping[Any, Any]) -> dict[str, Tensor]:
    """A state dict, without the prefixes of DataParallel and torch.compile."""
    state = dict(found)
    if not state:
        raise UserError(f"{path} holds no tensors")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: expected named tensors, got {clip(type(value).__name__)} at {clip(key)}")
        plain = value.layout is torch.strided and not value.is_quantized and value.device.type == "cpu"
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{path}: {clip(key)} is not a plain tensor with numbers of its own; save a plain state_dict()")
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def fit(state: Mapping[str, Tensor], network: str) -> Fit:
    """What fits and what does not; the number of classes is the head's rows."""
    rename = published_key(network)
    ours: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    wrong: list[str] = []
    for key, value in state.items():
        target = rename(key)
        wrong += [f"{clip(key)} and {clip(origin[target])} are the same tensor"] if target in origin else []
        ours[target], origin[target] = value, key
    head = ours.get("head.weight")
    if head is not None and head.ndim == 4 and head.shape[2:] == (1, 1):  # mdistiller's MobileNetV2: a 1x1 convolution
        head = ours["head.weight"] = head.flatten(1)
    classes = head.shape[0] if head is not None and head.ndim == 2 and head.numel() else 100
    expected = shapes(network, classes)
    filled, counters = {}, 0
    wrong += [f"{clip(origin[key])} is left over" for key in ours if key not in expected]
    for key, shape in expected.items():
        if key in ours and tuple(ours[key].shape) != shape:
            wrong.append(f"{clip(origin[key])} is {tuple(ours[key].shape)}, expected {shape}")
        elif key in ours:
            filled[key] = ours[key]
        elif key.endswith(COUNTER):
            filled[key], counters = torch.zeros((), dtype=torch.int64), counters + 1
        else:
            wrong.append(f"{key} is missing")
    return Fit(network, classes, filled, counters, wrong)


def fit_native(state: Mapping[str, Tensor], name: str, net: Net, classes: int) -> Fit:
    """A state dict held against a network from elsewhere (torchvision's, timm's, one's own), which has its keys."""
    native = native_state(net)
    needed = native.keys() - getattr(net, "unused", {}).keys()
    wrong = [f"{clip(key)} is left over" for key in state if key not in native]
    wrong += [f"{key} is missing" for key in native if key in needed - state.keys() and not key.endswith(COUNTER)]
    both = [key for key in native if key in state]
    wrong += [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(native[key].shape)}"
        for key in both
        if state[key].shape != native[key].shape
    ]
    counters = sum(key.endswith(COUNTER) for key in needed - state.keys())
    return Fit(name, classes, {key: state[key] for key in both}, counters, wrong)


def weights(path: Path, found: Fit) -> dict[str, Tensor]:
    """A state dict of our own: float32, no memory shared with the file's."""
    if sick := [key for key, value in found.state.items() if not value.isfinite().all()]:
        raise UserError(f"{path}: {len(sick)} tensors hold nan or infinity, first {sick[0]} (our name): it cannot teach")
    kinds = {key: torch.int64 if key.endswith(COUNTER) else torch.float32 for key in found.state}
    return {key: value.detach().to(kinds[key], copy=True).contiguous() for key, value in found.state.items()}


@cache
def shapes(network: str, classes: int = 1) -> dict[str, tuple[int, ...]]:
    """Of the network's tensors; nothing is drawn or held."""
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in build(network, classes).state_dict().items()}


def nearest(state: Mapping[str, Tensor]) -> list[Fit]:
    """All networks whose tensors these are; else the one that differs least."""
    fits = sorted((fit(state, network) for network in NETWORKS), key=lambda f: len(f.wrong))
    return [f for f in fits if not f.wrong] or fits[:1]


def choose(file: Path, found: Published, arch: str | None) -> Fit:
    """The network asked for, or named in the file, if every tensor fits."""
    if arch is not None and arch not in NETWORKS:
        raise UserError(f"--arch: there is no {arch!r}{suggestion(arch, list(NETWORKS))}")
    name = arch or in_table(found.named)
    if name is None:
        fits = nearest(found.state)
        said = "does not say which network it holds" if found.named is None else f"names {clip(found.named)!r}, not known here"
        close = " or ".join(f"--arch {f.network}" for f in fits)
        raise UserError(
            f"{file} {said}; " + (f"its tensors fit {close}" if not fits[0].wrong else f"the nearest is {differs(fits[0])}")
        )
    return matched(file, found, name, "--arch ")


def matched(file: Path, found: Published, network: str, option: str = "") -> Fit:
    """Every tensor in its place in a network of the table; `option`: what is typed before another network's name."""
    match = fit(found.state, network)
    if not match.wrong:
        return match
    best = nearest(found.state)
    close = f"they fit {option}" + f" or {option}".join(f.network for f in best)
    raise UserError(
        f"{file}: its tensors are not those of {differs(match)}; "
        + (f"the nearest network is {best[0].network}, {len(best[0].wrong)} differences" if best[0].wrong else close)
    )


def differs(match: Fit) -> str:
    """A network and what is different, short."""
    more = f" and {len(match.wrong) - 3} more differences" if len(match.wrong) > 3 else ""
    return f"{match.network}: {', '.join(match.wrong[:3])}{more}"


def in_table(named: str | None) -> str | None:
    """RepDistiller's vgg8_bn is our vgg8, and so on; None: not in the table."""
    plain = {name.lower().replace("_", ""): name for name in NETWORKS}
    if named is None or named in NETWORKS:
        return named
    return plain.get(named.removesuffix("_bn").lower().replace("_", "").replace("-", ""))


def describe(file: Path, found: Published, network: str, counters: int) -> list[str]:
    """What was matched."""
    lines = [f"{file}: layout {found.layout}; {network}, all {len(found.state)} tensors matched"]
    if counters:
        lines.append(f"{counters} counters {COUNTER} are not in the file: they start at 0, which changes no answer")
    return lines


def left_out(found: Published, used: Set[str] = frozenset()) -> list[str]:
    """What the file holds beside the network and nobody used."""
    lines = []
    for module, tensors in found.beside.items():
        if module == "proj" and module not in used:
            lines.append(
                "left out: SimKD's projector; the student's own classifier, which SimKD does not train, answers. For the"
                " network that SimKD deploys: python -m pupil import with --teacher and the teacher's model folder"
            )
        elif module not in used:
            hint = "; with both classifiers: python -m pupil import with --mix W" if module == "t_head" else ""
            lines.append(f"left out: the {len(tensors)} tensors of {module}{hint}")
    return lines + ([f"left out: {', '.join(found.others)}"] if found.others else [])
