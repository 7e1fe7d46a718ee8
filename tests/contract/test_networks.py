"""What holds for every row of the table of networks."""

import sys

import pytest
import torch
from torch import Tensor

from pupil.models import NETWORKS, build
from pupil.models.resnet_branches import MultiBranch
from pupil.net import Net, probe
from pupil.types import Features
from tests import tiny

K = 7
LARGE = {  # seconds each
    *("resnet110x2", "resnet44x4", "resnet56x4", "resnet110x4", "ResNet50", "ResNet101", "ResNet152", "wrn_28_10"),
    *("imagenet_resnet101", "imagenet_resnet152", "imagenet_resnext101_32x8d", "mdistiller_resnet101", "mdistiller_resnet152"),
    *(f"imagenet_resnet{n}" for n in ("10x2", "18x2", "26x2", "34x2", "34x4")),
    *("imagenet_wide_resnet50_2", "imagenet_wide_resnet101_2", "wide_resnet20_8_gl"),
    *(f"spot_vgg{n}_imagenet" for n in (8, 11, 13, 16, 19)),
}
ONE_OF_EACH_FAMILY = {f.__module__: name for name, f in reversed(NETWORKS.items()) if name not in LARGE}


FAMILIES = {f.__module__: name for name, f in reversed(NETWORKS.items())}  # the first of each
OF_EACH_FAMILY = [*(FAMILIES | ONE_OF_EACH_FAMILY).values(), "vgg8_plain"]


@pytest.mark.parametrize("size", [64, 28])
@pytest.mark.parametrize("name", OF_EACH_FAMILY)
@torch.no_grad()
def test_a_family_takes_other_sizes(name: str, size: int) -> None:
    check_shapes(build(name, K).eval().features(torch.randn(2, 3, size, size)))


def check_shapes(f: Features) -> None:
    assert f.logits.shape == (2, K)
    assert f.logits.isfinite().all()
    assert [m.shape[2] for m in f.maps] == sorted((m.shape[2] for m in f.maps), reverse=True), "shallow to deep"


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in NETWORKS])
@torch.no_grad()
def test_features_are_what_they_are_called(name: str) -> None:
    torch.manual_seed(0)
    net, x = build(name, K), torch.randn(2, 3, 32, 32)
    f = net.eval().features(x)
    check_shapes(f)
    assert torch.equal(net(x), f.logits)
    assert torch.equal(net.head(f.embedding), f.logits)
    assert net.pools_last is (f.last.shape[1] == f.embedding.shape[1])
    if net.pools_last:
        assert torch.equal(f.last.mean((2, 3)), f.embedding)
    assert len(f.maps) == len(f.pre) == len(net.stages)
    assert f.taps == (f.stem, *f.maps, f.embedding)
    for pre, tap in zip(f.pre, f.maps, strict=True):
        assert pre.shape == tap.shape
        assert pre.min() < 0, "before the ReLU"
        if tap.min() >= 0:  # else the map is signed: pre-activation, or a linear bottleneck
            assert torch.equal(pre.relu().sort(1).values, tap.sort(1).values), "the same values; a shuffle may follow the ReLU"


@pytest.mark.parametrize("name", OF_EACH_FAMILY)
def test_probe_gives_shapes_and_leaves_the_network_as_it_was(name: str) -> None:
    net = build(name, K)
    before = tiny.state(net)
    f = probe(net, 32)
    assert tiny.same(before, tiny.state(net))
    assert all(m.training for m in net.modules())
    assert f.logits.shape == (1, K)


def answers(net: Net, x: Tensor) -> list[Tensor]:
    return list(net.branches(x)) if isinstance(net, MultiBranch) else [net.features(x).logits]


@pytest.mark.parametrize("name", OF_EACH_FAMILY)
def test_every_parameter_gets_a_gradient_and_one_seed_gives_one_network(name: str) -> None:
    torch.manual_seed(1)
    net = build(name, K)
    sum(answer.square().sum() for answer in answers(net, torch.randn(2, 3, 32, 32))).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    torch.manual_seed(1)
    assert tiny.same(dict(build(name, K).named_parameters()), dict(net.named_parameters()))
    assert not tiny.same(dict(build(name, K).named_parameters()), dict(net.named_parameters()))


def test_every_network_has_a_map_from_published_keys() -> None:
    assert all(hasattr(sys.modules[f.__module__], "published_key") for f in NETWORKS.values())
