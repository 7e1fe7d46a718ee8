"""The training loop that published code of distillation has in common, written plainly: what `step.py` measures ours against.

DataLoader workers turn stored pixels into PIL images and crop, flip, convert and normalise them one by one; both networks run
eagerly in float32 on contiguous tensors; loss and accuracies are read by `.item()` in every step.  The networks and the
trained layers are ours, since the loop is what differs.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.literal import softened_kl
from benchmarks.literal_maps import LITERAL
from pupil.methods.base import Method
from pupil.parts import Parts
from pupil.types import Batch, Features

Example = tuple[Tensor, int, int]


class Images(Dataset[Example]):
    """(N, 3, 32, 32) uint8 pixels as PIL images, transformed when they are asked for."""

    def __init__(self, pixels: Tensor, labels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.pixels, self.labels = pixels.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
        crop = transforms.RandomCrop(pixels.shape[2], padding=4)
        self.transform = transforms.Compose(
            [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(mean, std)]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        image: Any = Image.fromarray(self.pixels[index])
        return self.transform(image), self.labels[index], index


class CommonLoop:
    """A method, step by step, with SGD at the usual settings; `alone`: a student by itself."""

    def __init__(
        self, name: str, method: Method, data: Images, batch: int, workers: int, device: torch.device, stay: bool = True
    ) -> None:
        """`stay`: the workers live on from epoch to epoch."""
        self.name, self.method, self.device = name, method, device
        self.optimizer = torch.optim.SGD(method.parameters(), 0.05, 0.9, weight_decay=5e-4)
        self.loader = DataLoader(data, batch, shuffle=True, num_workers=workers, persistent_workers=stay and workers > 0)

    def batches(self) -> Iterator[Any]:
        return iter(self.loader)

    def loss(self, s: Features, t: Features | None, labels: Tensor, ids: Tensor) -> Tensor:
        if t is None:
            return F.cross_entropy(s.logits, labels)
        hp = self.method.hp
        if self.name == "simkd":
            return ((s.last - t.last) ** 2).mean()
        total = hp.ce * F.cross_entropy(s.logits, labels)
        if hp.kl:
            total = total + hp.kl * softened_kl(s.logits, t.logits, hp.T)
        if hp.beta:
            total = total + hp.beta * LITERAL[self.name](self.method, s, t, Batch(s.logits, labels, ids))
        return total

    def step(self, batch: Any, parts: Parts) -> None:
        images, labels, ids = (x.to(self.device) for x in batch)
        self.method.train()
        with torch.no_grad(), parts("teacher"):
            t = None if self.name == "alone" else self.method.teacher.features(images)
        with parts("student forward"):
            s = self.method.student.features(images)
        with parts("loss"):
            loss = self.loss(s, t, labels, ids)
        with parts("backward"):
            self.optimizer.zero_grad()
            loss.backward()
        with parts("optimiser"):
            self.optimizer.step()
        with parts("rest"):
            loss.item()
            right = s.logits.topk(5, 1).indices == labels[:, None]
            right[:, :1].float().sum().item()
            right.float().sum().item()
