"""Classifiers on the student's maps: of the teacher's answer, or of clusters of classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pupil.methods.base import Setup
from pupil.methods.functions import kl
from pupil.types import UserError

Clusters = Sequence[Sequence[int]]  # classes, each in one of them
SYNTAX = {"mid": "SPOT:T, such as '1:4 2:2'", "clusters": "SPOT:CLASSES/CLASSES, such as '1:0,1,2/3,4'"}


class Midway(nn.Module):
    """A linear classifier of the pooled map at each of several spots."""

    def __init__(self, widths: Mapping[int, int], classes: Mapping[int, int]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({str(spot): nn.Linear(widths[spot], n) for spot, n in classes.items()})

    def scores(self, taps: Sequence[Tensor]) -> dict[int, Tensor]:
        """Taps of the student, (B, C, H, W) -> spot -> (B, its classes)."""
        return {int(spot): head(taps[int(spot)].mean((2, 3))).float() for spot, head in self.heads.items()}


class MidClassifiers(Midway):
    """The sum over spots of KL_T(softmax(z_t / T) || softmax(scores / T)), each with a T of its own."""

    def __init__(self, widths: Mapping[int, int], temperatures: Mapping[int, float], classes: int) -> None:
        super().__init__(widths, dict.fromkeys(temperatures, classes))
        self.temperatures = temperatures

    def forward(self, taps: Sequence[Tensor], logits_t: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([kl(z, logits_t, self.temperatures[spot]) for spot, z in self.scores(taps).items()]).sum()


class Hierarchy(Midway):
    """The sum over spots of cross-entropy with the label's cluster, weighed by 1 / its size (a weighted mean)."""

    def __init__(self, widths: Mapping[int, int], clusters: Mapping[int, Clusters]) -> None:
        super().__init__(widths, {spot: len(found) for spot, found in clusters.items()})
        for spot, found in clusters.items():
            cluster_of = {c: i for i, members in enumerate(found) for c in members}
            self.register_buffer(f"cluster_{spot}", torch.tensor([cluster_of[c] for c in range(len(cluster_of))]))
            self.register_buffer(f"weight_{spot}", torch.tensor([1 / len(members) for members in found]))

    def forward(self, taps: Sequence[Tensor], logits_t: Tensor, labels: Tensor) -> Tensor:
        losses = [
            F.cross_entropy(z, self.get_buffer(f"cluster_{spot}")[labels], self.get_buffer(f"weight_{spot}").to(z.dtype))
            for spot, z in self.scores(taps).items()
        ]
        return torch.stack(losses).sum()


def classifiers(setup: Setup, mid: str, clusters: str) -> nn.ModuleDict:
    """Those that the two settings ask for."""
    widths = {spot: f.shape[1] for spot, f in enumerate((setup.s.stem, *setup.s.maps))}
    classes, found = setup.s.logits.shape[1], nn.ModuleDict()
    if mid:
        found["mid"] = MidClassifiers(widths, parse("mid", mid, list(widths), classes), classes)
    if clusters:
        found["clusters"] = Hierarchy(widths, parse("clusters", clusters, list(widths), classes))
    return found


def parse(setting: str, text: str, spots: Sequence[int], classes: int) -> dict[int, Any]:
    """Words SPOT:T (setting mid) or SPOT:CLASSES/CLASSES (clusters) -> spot -> its temperature or its clusters."""
    found: dict[int, Any] = {}
    for word in text.split():
        spot, _, value = word.partition(":")
        try:
            own = float(value) if setting == "mid" else [[int(c) for c in part.split(",")] for part in value.split("/")]
            found[int(spot)] = own
        except ValueError:
            raise UserError(f"hp.sakd.{setting}: expected words {SYNTAX[setting]}, got {word!r}") from None
        if int(spot) not in spots:
            raise UserError(f"hp.sakd.{setting}: the student has maps at spots {list(spots)}, got {spot}")
        if isinstance(own, float) and own <= 0:
            raise UserError(f"hp.sakd.{setting}: a temperature must be greater than 0, got {own:g} at spot {spot}")
        if isinstance(own, list) and sorted(c for part in own for c in part) != list(range(classes)):
            raise UserError(f"hp.sakd.{setting}: at spot {spot} each class from 0 to {classes - 1} must be in one cluster")
    return found
