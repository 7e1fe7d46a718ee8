"""What holds for every row of the table of networks."""

import sys

import pytest
import torch

from pupil.models import NETWORKS, build
from pupil.net import Net, probe
from tests import tiny

K = 7
every_network = pytest.mark.parametrize("name", NETWORKS)
SIZES = [(name, size) for name in NETWORKS for size in (32, 64, 28) if size != 28 or not name.startswith("vgg")]


@pytest.fixture(scope="module")
def nets() -> dict[str, Net]:
    """Built once: initialising the large ones takes most of the time."""
    torch.manual_seed(0)
    return {name: build(name, K) for name in NETWORKS}


@pytest.mark.parametrize(("name", "size"), SIZES)
@torch.no_grad()
def test_network_gives_logits_at_every_size(name: str, size: int, nets: dict[str, Net]) -> None:
    net, x = nets[name].eval(), torch.randn(2, 3, size, size)
    f = net.features(x)
    assert f.logits.shape == (2, K)
    assert f.logits.isfinite().all()
    assert [m.shape[2] for m in f.maps] == sorted((m.shape[2] for m in f.maps), reverse=True), "shallow to deep"


@every_network
@torch.no_grad()
def test_features_are_what_they_are_called(name: str, nets: dict[str, Net]) -> None:
    net, x = nets[name].eval(), torch.randn(2, 3, 32, 32)
    f = net.features(x)
    assert torch.equal(net(x), f.logits)
    assert torch.equal(net.head(f.embedding), f.logits)
    assert torch.equal(f.last.mean((2, 3)), f.embedding)
    assert len(f.maps) == len(f.pre) == len(net.stages)
    assert f.taps == (f.stem, *f.maps, f.embedding)
    for pre, tap in zip(f.pre, f.maps, strict=True):
        assert pre.shape == tap.shape
        assert pre.min() < 0, "before the ReLU"
    if not name.startswith("wrn"):
        assert all(torch.equal(pre.relu(), tap) for pre, tap in zip(f.pre, f.maps, strict=True))


@every_network
def test_probe_gives_shapes_and_leaves_the_network_as_it_was(name: str, nets: dict[str, Net]) -> None:
    net = nets[name].train()
    before = tiny.state(net)
    f = probe(net, 32)
    assert tiny.same(before, tiny.state(net))
    assert all(m.training for m in net.modules())
    assert f.logits.shape == (1, K)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "vgg8_plain"])
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
