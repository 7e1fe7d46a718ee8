"""What holds for every row of the table of networks."""

import sys

import pytest
import torch

from pupil.models import NETWORKS, build
from pupil.net import Net, probe
from tests import tiny

K = 7
LARGE = {  # seconds each
    *("resnet110x2", "resnet44x4", "resnet56x4", "resnet110x4", "ResNet50", "ResNet101", "ResNet152", "wrn_28_10"),
    *("imagenet_resnet101", "imagenet_resnet152", "imagenet_resnext101_32x8d", "mdistiller_resnet101", "mdistiller_resnet152"),
    *(f"imagenet_resnet{n}" for n in ("10x2", "18x2", "26x2", "34x2", "34x4")),
    *("imagenet_wide_resnet50_2", "imagenet_wide_resnet101_2"),
}
ONE_OF_EACH_FAMILY = {f.__module__: name for name, f in reversed(NETWORKS.items()) if name not in LARGE}


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in NETWORKS])
def net(request: pytest.FixtureRequest) -> Net:
    """Built once for all tests, and then forgotten."""
    torch.manual_seed(0)
    return build(request.param, K)


@pytest.mark.parametrize("size", [32, 64, 28])
@torch.no_grad()
def test_network_gives_logits_at_every_size(net: Net, size: int) -> None:
    f = net.eval().features(torch.randn(2, 3, size, size))
    assert f.logits.shape == (2, K)
    assert f.logits.isfinite().all()
    assert [m.shape[2] for m in f.maps] == sorted((m.shape[2] for m in f.maps), reverse=True), "shallow to deep"


@torch.no_grad()
def test_features_are_what_they_are_called(net: Net) -> None:
    x = torch.randn(2, 3, 32, 32)
    f = net.eval().features(x)
    assert torch.equal(net(x), f.logits)
    assert torch.equal(net.head(f.embedding), f.logits)
    assert torch.equal(f.last.mean((2, 3)), f.embedding)
    assert len(f.maps) == len(f.pre) == len(net.stages)
    assert f.taps == (f.stem, *f.maps, f.embedding)
    for pre, tap in zip(f.pre, f.maps, strict=True):
        assert pre.shape == tap.shape
        assert pre.min() < 0, "before the ReLU"
        if tap.min() >= 0:  # else the map is signed: pre-activation, or a linear bottleneck
            assert torch.equal(pre.relu().sort(1).values, tap.sort(1).values), "the same values; a shuffle may follow the ReLU"


def test_probe_gives_shapes_and_leaves_the_network_as_it_was(net: Net) -> None:
    net.train()
    before = tiny.state(net)
    f = probe(net, 32)
    assert tiny.same(before, tiny.state(net))
    assert all(m.training for m in net.modules())
    assert f.logits.shape == (1, K)


@pytest.mark.parametrize("name", [*ONE_OF_EACH_FAMILY.values(), "vgg8_plain"])
def test_every_parameter_gets_a_gradient_and_one_seed_gives_one_network(name: str) -> None:
    torch.manual_seed(1)
    net = build(name, K)
    net.features(torch.randn(2, 3, 32, 32)).logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    torch.manual_seed(1)
    assert tiny.same(dict(build(name, K).named_parameters()), dict(net.named_parameters()))
    assert not tiny.same(dict(build(name, K).named_parameters()), dict(net.named_parameters()))


def test_every_network_has_a_map_from_published_keys() -> None:
    assert all(hasattr(sys.modules[f.__module__], "published_key") for f in NETWORKS.values())
