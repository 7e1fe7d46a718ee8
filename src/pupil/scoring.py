"""What a network answers on a split, and how good that is.  Every sample counts once."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from pupil.methods.base import Measure
from pupil.net import Net, evaluating
from pupil.types import Loader


def score(net: Net, batches: Loader, measure: Measure | None = None) -> dict[str, float]:
    """Top-1 in percent, mean negative log-likelihood in nats, and what `measure` says of the embeddings."""
    logits, labels = predict(net, batches)
    nll = nn.functional.cross_entropy(logits, labels).item()
    values = {"top1": 100 * (logits.argmax(1) == labels).double().mean().item(), "nll": nll}
    if measure is not None:
        values[measure[0]] = measure[1](*outputs(net, batches, lambda images: net.features(images).embedding))
    return values


def score_answers(method: Any, batches: Loader) -> dict[str, float]:
    """Top-1 in percent of what a method answers by other ways than its student."""
    found = {name: outputs(cast(nn.Module, method), batches, answer) for name, answer in method.answers().items()}
    return {name: 100 * (z.argmax(1) == labels).double().mean().item() for name, (z, labels) in found.items()}


def predict(net: nn.Module, batches: Loader) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and labels (N,) of a split in its own order, on the CPU; the network's mode is left as it was."""
    return outputs(net, batches, net)


@torch.inference_mode()
def outputs(net: nn.Module, batches: Loader, answer: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Answers (N, ...) and labels (N,), as `predict`."""
    with evaluating(net):
        pairs = [(answer(b.images).float(), b.labels) for b in batches.epoch(0)]
    answers, labels = torch.cat([a for a, _ in pairs]).cpu(), torch.cat([y for _, y in pairs]).cpu()
    assert len(labels) == batches.samples, "every sample is counted once"
    return answers, labels


def snapshot(net: nn.Module) -> dict[str, Tensor]:
    """The weights as they are now, on the CPU."""
    return {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in net.state_dict().items()}
