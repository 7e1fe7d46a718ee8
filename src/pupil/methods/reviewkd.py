"""ReviewKD: fuse the student's maps from deep to shallow and compare each fusion with the teacher at several scales.

Paper: Chen et al., CVPR 2021, arXiv:2104.09044.
Loss: ce * CE + kl * KL(T) + beta * min(epoch / warm_up, 1) * sum over levels of D(fused_i, f_t_i).  The levels are the
stages and, deepest, the embedding as a 1x1 map.  D is the mean squared difference at full size (weight 1) and after
average pooling to 4, 2 and 1 (weights 1/2, 1/4, 1/8, only sizes below the map's), divided by the sum of the weights.
A level is x = BN(1x1 conv(f_s)); all but the deepest blend in the previous x, by x * a_0 + nearest(x_prev) * a_1 with a the
sigmoid of a 1x1 convolution of both; x is resized (nearest) to the teacher's map, and fused = BN(3x3 conv(x)).
Trained: the student and the fusions.  Deployed: the student.
Defaults: mdistiller's for resnet32x4 -> resnet8x4 (beta 5, warm-up of 20 epochs, the student's maps after their ReLU).
Presets: mdistiller's two ImageNet pairs.
Deviations: sizes are taken from the maps; where the numbers of stages differ, the deepest are paired; a batch of one image
takes the running statistics where a batch norm would see one value.  As theirs, x is min(512, embedding) wide.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pupil.methods.base import Method, Setup, needs_maps
from pupil.types import Batch, Features, UserError


class ReviewKD(Method):
    paper = "Chen et al., CVPR 2021, arXiv:2104.09044"
    needs_same_classes = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mdistiller": {},
        "mdistiller_resnet34-mdistiller_resnet18": {"beta": 1.0, "warm_up": 1, "before_relu": True},
        "mdistiller_resnet50-mobilenet_v1": {"beta": 8.0, "warm_up": 1},
    }

    @dataclass(frozen=True)
    class Config(Method.Config):
        beta: float = 5.0
        warm_up: int = 20  # epochs until the term has its full weight
        before_relu: bool = False  # whether the student's maps are taken before their ReLU; the teacher's always are

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        needs_maps("reviewkd", setup)
        if hp.warm_up < 1:
            raise UserError(f"reviewkd: hp.reviewkd.warm_up must be at least 1 epoch, got {hp.warm_up}")
        ours, theirs = self.levels(setup.s, setup.t)
        mid = min(512, ours[0].shape[1])
        widths = [(a.shape[1], b.shape[1]) for a, b in zip(ours, theirs, strict=True)]
        self.fusions = nn.ModuleList(Fusion(c_in, mid, c_out, blend=k > 0) for k, (c_in, c_out) in enumerate(widths))

    def levels(self, s: Features, t: Features) -> tuple[list[Tensor], list[Tensor]]:
        """The maps (B, C, H, W) that are paired, deep to shallow, the embeddings first."""
        maps, targets = s.pre if self.hp.before_relu else s.maps, t.pre
        n = min(len(maps), len(targets))
        ours, theirs = (*maps[-n:], s.embedding[:, :, None, None]), (*targets[-n:], t.embedding[:, :, None, None])
        return list(reversed(ours)), list(reversed(theirs))

    def knowledge(self, s: Features, t: Features, batch: Batch) -> Tensor:
        ours, theirs = self.levels(s, t)
        x, losses = None, []
        for fuse, f_s, f_t in zip(self.fusions, ours, theirs, strict=True):
            fused, x = fuse(f_s, x, f_t.shape[2:])
            losses.append(at_several_scales(fused.float(), f_t.float()))
        return min(batch.epoch / self.hp.warm_up, 1.0) * torch.stack(losses).sum()


class Fusion(nn.Module):
    """(B, c_in, H, W), the previous x (B, mid, H', W') and a size -> the fused map (B, c_out, *size), x (B, mid, *size)."""

    def __init__(self, c_in: int, mid: int, c_out: int, blend: bool) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(c_in, mid, 1, bias=False), Norm(mid))
        self.attend = nn.Conv2d(2 * mid, 2, 1) if blend else None
        self.leave = nn.Sequential(nn.Conv2d(mid, c_out, 3, 1, 1, bias=False), Norm(c_out))
        for layers in (self.enter, self.leave):
            nn.init.kaiming_uniform_(layers[0].weight, a=1)  # type: ignore[arg-type]

    def forward(self, f: Tensor, previous: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        x = self.enter(f)
        if self.attend is not None and previous is not None:
            y = F.interpolate(previous, x.shape[2:], mode="nearest")
            a = self.attend(torch.cat([x, y], 1)).sigmoid()
            x = x * a[:, :1] + y * a[:, 1:]
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="nearest")
        return self.leave(x), x


class Norm(nn.BatchNorm2d):
    """Batch norm that takes its running statistics where the batch is a single value per channel."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input[:, 0].numel() == 1:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(input)


def at_several_scales(a: Tensor, b: Tensor) -> Tensor:
    """Two maps (B, C, H, W) -> their weighted mean squared differences at full size and pooled."""
    sizes = [size for size in (4, 2, 1) if size < a.shape[2]]
    weights = [0.5**i for i in range(len(sizes) + 1)]
    losses = [F.mse_loss(a, b)]
    losses += [F.mse_loss(F.adaptive_avg_pool2d(a, size), F.adaptive_avg_pool2d(b, size)) for size in sizes]
    return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum() / sum(weights)
