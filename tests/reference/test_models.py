"""Every network against what the authors' own networks gave, with weights and inputs that are a rule.

The weights are filled by the keys of the authors' checkpoints, so a vector that agrees shows that a published
checkpoint loads: every key has its place here and every tensor here has its key.
"""

import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pupil.models import NETWORKS
from pupil.models.resnet_branches import MultiBranch
from pupil.net import Net
from tests.reference.golden import Case, difference, listings

POST_ACT = {f"resnet{n}": f"resnet{n}" for n in ("8", "14", "20", "32", "44", "56", "110", "8x4", "32x4")}
POST_ACT_SIMKD = ("38", "116", "200", "14x2", "38x2", "110x2", "14x4", "20x4", "26x4", "38x4", "44x4", "56x4", "110x4")
FOUR_STAGES = {f"ResNet{n}": f"ResNet{n}" for n in (18, 34, 50, 101, 152)}
PRE_ACT = {name: name for name in ("wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2", "wrn_28_10")}
WITH_BN = {f"vgg{n}_bn": f"vgg{n}" for n in (8, 11, 13, 16, 19)}
WITHOUT_BN = {f"vgg{n}": f"vgg{n}_plain" for n in (8, 11, 13, 16, 19)}
ALWAYS_BN = {f"vgg{n}": f"vgg{n}" for n in (8, 11, 13, 16, 19)}
MOBILE = {"mobile_half": "MobileNetV2", "mobile_half_double": "MobileNetV2_1_0"}
SHUFFLE = {name: name for name in ("ShuffleV1", "ShuffleV2", *(f"ShuffleV2_{n}" for n in ("0_2", "0_5", "1_5", "2_0")))}
RESNETS = (18, 34, 50, 101, 152)
IMAGENET = {f"imagenet_resnet{n}": f"imagenet_resnet{n}" for n in RESNETS}
IMAGENET |= {
    f"imagenet_wide_resnet{n}_{k}": f"imagenet_resnet{n}x{k}" for n, k in ((10, 2), (18, 2), (26, 2), (34, 2), (34, 4))
}
IMAGENET |= {f"imagenet_{n}": f"imagenet_{n}" for n in ("resnext50_32x4d", "resnext101_32x8d", "mobilenet_v2")}
IMAGENET |= {f"imagenet_wide_resnet{n}_2": f"imagenet_wide_resnet{n}_2" for n in (50, 101)}
EARLY_STEM = {f"imagenet_resnet{n}": f"mdistiller_resnet{n}" for n in RESNETS} | {"imagenet_MobileNetV1": "mobilenet_v1"}
CSKD = {f"wide_resnet-{n}": f"cskd_wrn_{n.replace('-', '_')}" for n in ("16-1", "40-2")}
CSKD |= {f"resnet{n}": f"imagenet_resnet{n}" for n in RESNETS}
REFILLED = {f"wide_resnet_{n}": f"refilled_wrn_{n}" for n in ("16_1", "16_2", "40_1", "40_2")}
REFILLED |= {f"resnet_{n}": f"refilled_resnet{n}" for n in (20, 32, 44, 56, 110)} | {"mobile_net_1.0": "mobilenet_v1"}
REFILLED |= {f"mobile_net_0.{n}": f"mobilenet_v1_x0_{n}" for n in (25, 5, 75)}
OURS = {  # repository -> its constructor -> our network
    "RepDistiller": POST_ACT | FOUR_STAGES | PRE_ACT | WITH_BN | WITHOUT_BN | MOBILE | SHUFFLE,
    "HeadSharingKD": POST_ACT | FOUR_STAGES | PRE_ACT | WITH_BN | WITHOUT_BN | MOBILE | SHUFFLE,
    "SimKD": POST_ACT
    | {f"resnet{n}": f"resnet{n}" for n in POST_ACT_SIMKD}
    | WITH_BN
    | WITHOUT_BN
    | MOBILE
    | SHUFFLE
    | IMAGENET,
    "spot-adaptive-pytorch": POST_ACT
    | FOUR_STAGES
    | PRE_ACT
    | ALWAYS_BN
    | {f"vgg{n}-imagenet": f"spot_vgg{n}_imagenet" for n in (8, 11, 13, 16, 19)}
    | {name: name for name in ("resnet32_gl", "resnet110_gl", "wide_resnet20_8_gl")}
    | {"MobileNetV2": "MobileNetV2_1_0", "ShuffleNetV1": "ShuffleV1", "ShuffleNetV2": "ShuffleV2"},
    "ClassSpecialization-CSKD": CSKD,
    "REFILLED": REFILLED,
    "mdistiller": POST_ACT
    | EARLY_STEM
    | FOUR_STAGES
    | PRE_ACT
    | ALWAYS_BN
    | SHUFFLE
    | {"MobileNetV2": "MobileNetV2", "tinyimagenet_MobileNetV2": "MobileNetV2_tiny"},
}
Rename = Callable[[str], str]  # an authors' key -> ours
TOLERANCE, IN_TRAINING = 1e-4, 2e-3  # of max|reference|


def test_network_matches_golden_vector(case: Case) -> None:
    name = ours(case.meta["source_repo"], case.meta["constructor"])
    if name is None:
        pytest.skip(f"pupil has no network {case.meta['constructor']!r} of {case.meta['source_repo']} yet")
    row = description(case, name)
    net = NETWORKS[name](case.integer("num_classes"))
    rename: Rename = sys.modules[NETWORKS[name].__module__].published_key
    wrong = fill(net, row["state_dict"], rename)
    alike = [r for r in listings(case.path.parent / "models.json") if r.get("identical_to") == case.path.name]
    wrong += [f"{r['repo']}'s {r['constructor']} is no {name} here" for r in alike if ours(r["repo"], r["constructor"]) != name]
    if row["num_classes"] == case.integer("num_classes"):
        found = sum(p.numel() for p in net.parameters())
        wrong += [] if found == row["total_params"] else [f"{found} parameters, expected {row['total_params']}"]
    size, images = case.integer("input_size"), inputs(case)
    values = evaluated(net, images, case) | trained(net, images, case, rename)
    values |= {"num_classes": case.integer("num_classes"), "input_size": size, "input_first8": images.flatten()[:8]}
    for output, reference in case.arrays.items():
        if output == "last_bn_key":
            continue  # says what last_bn_* are
        if output not in values:
            wrong.append(f"{output}: never compared")
            continue
        floor = float(case.arrays["input_grad_maxabs"]) if output.startswith("input_grad") else 0.0
        wrong += difference(output, values[output], reference, tolerance(case, output), floor)
    assert not wrong, "\n".join([case.id, *wrong])


def ours(repo: str, constructor: str) -> str | None:
    return OURS.get(repo, {}).get(constructor.removesuffix("-in64"))


def tolerance(case: Case, output: str) -> float:
    usual = IN_TRAINING if output == "logits_train_mode" else case.meta.get("suggested_tolerance", TOLERANCE)
    return (case.meta.get("suggested_tolerance_per_output") or {}).get(output, usual)


# --- the rules of the golden README ------------------------------------------------------------------------------------


def description(case: Case, name: str) -> dict[str, Any]:
    """The row of models.json beside the vector, or of ours, for this constructor, or for the same network elsewhere."""
    for folder in (case.path.parent, Path(__file__).parents[1] / "golden"):
        rows = listings(folder / "models.json")
        own = [r for r in rows if r.get("golden_file") == f"{case.path.stem}.npz" and not r.get("identical_to")]
        same = [r for r in rows if (r["repo"], r["constructor"]) == (case.meta["source_repo"], case.meta["constructor"])]
        alike = [r for r in rows if ours(r["repo"], r["constructor"]) == name]
        for row in own + same + alike:
            return row
    raise AssertionError(f"{case.id}: no models.json lists the keys of {case.meta['constructor']}")


def inputs(case: Case) -> Tensor:
    size, batch = case.integer("input_size"), len(case.arrays["logits"])
    return torch.from_numpy(np.random.default_rng([1234, size]).standard_normal((batch, 3, size, size)).astype(np.float32))


def fill(net: Net, listing: Sequence[tuple[str, Sequence[int], str]], rename: Rename) -> list[str]:
    """Fills the network by the authors' keys; what does not fit, one line each."""
    tensors = net.state_dict()
    wrong, filled = [], {}
    for key, shape, _ in listing:
        target = rename(key)
        if target not in tensors:
            wrong.append(f"{key} -> {target}: we have no such tensor")
            continue
        # a vector with another number of classes than its row: the head's shape is ours
        expected = tuple(tensors[target].shape) if target.startswith("head.") else tuple(shape)
        if tuple(tensors[target].shape) != expected:
            wrong.append(f"{key} -> {target}: shape {tuple(tensors[target].shape)}, expected {expected}")
            continue
        if target in filled:
            wrong.append(f"{key} -> {target}: filled twice")
        filled[target] = weight(key, expected)
    wrong += [f"{key}: filled by no key" for key in tensors if key not in filled]
    if not wrong:
        net.load_state_dict(filled)
    return wrong


def weight(key: str, shape: tuple[int, ...], hashed: str | None = None) -> Tensor:
    """`hashed`: the text that seeds it, where that is not the key."""
    if key.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    n = np.random.default_rng(zlib.crc32((hashed or key).encode())).standard_normal(shape)
    *path, last = key.split(".")
    if last == "running_var":
        value = 1 + 0.1 * np.abs(n)
    elif last in ("bias", "running_mean"):
        value = 0.1 * n
    elif len(shape) >= 2:
        value = n / np.sqrt(np.prod(shape[1:]))
    else:
        value = (1 + 0.1 * n) * (0.5 if path[-1] in ("bn2", "bn3") else 1.0)
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def evaluated(net: Net, images: Tensor, case: Case) -> dict[str, Any]:
    """Logits, every tap, every pre-activation and the gradient of the input, in evaluation mode."""
    net.eval()
    x = images.clone().requires_grad_()
    f = net.features(x)
    w = torch.from_numpy(np.random.default_rng(7).standard_normal(f.logits.shape).astype(np.float32))
    (grad,) = torch.autograd.grad((f.logits * w).sum(), x)
    values: dict[str, Any] = {
        "logits": f.logits,
        "input_grad_norm": grad.norm(),
        "input_grad_maxabs": grad.abs().max(),
        "input_grad_first64": grad[0].flatten()[:64],
        "input_grad_sample1_first64": grad[1:2].flatten()[:64],
    }
    first = first_tap(case)
    pooled = f.embedding.reshape(*case.arrays.get("pooled_shape", f.embedding.shape))  # some keep two dimensions of 1
    flat = case.meta["constructor"].endswith("-imagenet")  # the authors' embedding is the pooled map
    taps = (*f.taps[:-1], f.last.flatten(1)) if flat else f.taps
    tensors = {f"feat_{i}": tap for i, tap in enumerate(taps[first:])} | {"pooled": pooled, "pooled_returned": f.embedding}
    if isinstance(net, MultiBranch):
        branches = net.branches(images)
        assert torch.equal(branches.logits, f.logits)
        tensors |= {"out_pro": branches.peers, "out_x_m": branches.mixed}
    tensors |= {f"preact_{i}": pre for i, pre in enumerate((f.stem, *f.pre)[first:])}
    for name, tensor in tensors.items():
        a = tensor.detach()
        values[name], values[f"{name}_first64"] = a, a.flatten()[:64]
        values[f"{name}_shape"] = np.array(a.shape)
        values[f"{name}_mean_std"] = np.array([a.double().mean(), a.double().std(correction=0)])
    return values


def first_tap(case: Case) -> int:
    """Which of our taps the authors' list of features begins with."""
    if case.meta["source_repo"] == "REFILLED":
        return -1  # the embedding alone
    return int((case.meta["source_repo"], case.meta["constructor"]) == ("mdistiller", "imagenet_MobileNetV1"))  # no stem


@torch.no_grad()
def trained(net: Net, images: Tensor, case: Case, rename: Rename) -> dict[str, Any]:
    """Logits of one training-mode forward, and the last batch norm's statistics after it."""
    before = {key: value.clone() for key, value in net.state_dict().items()}
    values: dict[str, Any] = {"logits_train_mode": net.train()(images)}
    if "last_bn_key" in case:
        for statistic in ("running_mean", "running_var"):
            key = rename(f"{str(case.arrays['last_bn_key']).rpartition('.')[0]}.{statistic}")
            after, old = net.get_buffer(key)[:16], before[key][:16]
            if case.meta["source_repo"] == "mdistiller" and case.meta["constructor"].startswith("wrn"):
                after = after + (1 - 0.1) * (after - old)  # there it is updated twice by one forward (README)
            values[f"last_bn_{statistic}_after"] = after
    return values
