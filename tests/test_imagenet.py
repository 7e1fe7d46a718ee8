"""The ImageNet networks against torchvision's of the same name: its published weights load, and give the same logits."""

import pytest
import torch
import torchvision

from pupil.models import build, imagenet_mobilenet_v2, imagenet_resnet, imagenet_shufflenet_v2

FAMILIES = {
    imagenet_resnet: ("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"),
    imagenet_mobilenet_v2: ("mobilenet_v2",),
    imagenet_shufflenet_v2: tuple(f"shufflenet_v2_x{n}" for n in ("0_5", "1_0", "1_5", "2_0")),
}
SLOW = ("wide_resnet50_2",)


@pytest.mark.parametrize(
    ("family", "name"),
    [pytest.param(f, n, marks=[pytest.mark.slow] if n in SLOW else []) for f, names in FAMILIES.items() for n in names],
)
@torch.no_grad()
def test_network_is_torchvisions(family: object, name: str) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, num_classes=5).train()
    x = torch.randn(4, 3, 64, 64)
    theirs(x)  # moves the statistics of the batch norms
    ours = build(f"imagenet_{name}", 5)
    ours.load_state_dict({family.published_key(key): value for key, value in theirs.state_dict().items()})  # type: ignore[attr-defined]
    expected = theirs.eval()(x)
    assert torch.allclose(ours.eval()(x), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
