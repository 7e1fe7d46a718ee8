"""Data, networks and runs small enough for a test."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from pupil import fit as loop
from pupil.data.resident import Augment, Resident
from pupil.fit import Log, Trained, Watch, teacher_features
from pupil.methods import METHODS
from pupil.methods.base import Method, Setup
from pupil.models import build
from pupil.net import Net, probe
from pupil.optim import Optim
from pupil.training import Training
from pupil.types import Batch, Loader

CLASSES, SIZE, SAMPLES = 4, 16, 20
QUICK: dict[str, dict[str, Any]] = {  # what makes a method small
    **{name: {"k": 16, "dim": 8} for name in ("crd", "crdth")},
    **{name: {"init_epochs": 1} for name in ("ab", "fsp")},
    "ft": {"init_epochs": 1, "init_lr": 0.05},
    "refilled": {"init_epochs": 1, "init_lr": 0.01},
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in METHODS),
    ("kd", {"head": "init"}),
    ("crd", {"head": "frozen"}),
    ("thkd", {"mix": 0.3}),
    ("crdth", {"mix": 0.3, "head": "init"}),
    ("simkd", {"ce": 1.0, "kl": 1.0}),
    ("crd", {"kl": 1.0}),
    ("crd", {"positive": "relax", "bank": "float16"}),
    ("dkd", {"warmup": 1, "kl": 1.0}),
    ("fitnet", {"hint": 0, "kl": 1.0}),
    ("at", {"p": 4}),
    ("sp", {"layers": "all"}),
    ("rkd", {"distance": 1.0, "angle": 0.0}),
    ("kdsvd", {"k": 2}),
    ("kdsvd", {"axis": "width"}),
    ("ft", {"k": 0.3, "p2": 2}),
    ("ofd", {"kernel": 3, "kl": 1.0}),
    ("ofd", {"teacher_mode": "train"}),
    ("reviewkd", {"before_relu": True, "warm_up": 1}),
    ("refilled", {"mode": "tuple", "centres": "local"}),
    ("refilled", {"then": "simkd"}),
    ("cskd", {"icv_axis": "samples"}),
    ("sakd", {"of": "fitnet", "mode": "reverse", "deep_adapters": True}),
    ("sakd", {"of": "vid", "mode": "both"}),
    ("sakd", {"of": "rkd", "mode": "random"}),
    ("sakd", {"of": "sp", "homogeneous": True, "evaluate": "sampled"}),
    ("sakd", {"mode": "all", "mid": "1:4 2:2", "clusters": "3:0,1/2,3"}),
]
STUDENT = "resnet8"
TEACHERS = ("resnet14", "wrn_16_1")  # post- and pre-activation; embeddings as wide as the student's


def label(variant: object) -> str:
    """A readable test id."""
    if isinstance(variant, dict):
        return "-".join(f"{k}={v}" for k, v in variant.items()) or "default"
    return variant.optimizer if isinstance(variant, Optim) else str(variant)


def loader(seed: int | None = 0, samples: int = SAMPLES, batch_size: int = 8, size: int = SIZE) -> Resident:
    """Random images and labels, always the same; `seed` is that of order and augmentation."""
    g = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (samples, 3, size, size), generator=g, dtype=torch.uint8)
    labels = torch.arange(samples) % CLASSES
    return Resident(images, labels, (0.5,) * 3, (0.25,) * 3, batch_size, torch.device("cpu"), seed, Augment(2, True), True)


def first_batch(samples: int = 8) -> Batch:
    batch = next(iter(loader(None, batch_size=samples).epoch(1)))
    return batch._replace(strong=batch.images.flip(3))


def setup(teacher: str = TEACHERS[0], seed: int = 0, student: str = STUDENT) -> Setup:
    torch.manual_seed(1000)
    t = build(teacher, CLASSES).requires_grad_(False).eval()
    torch.manual_seed(seed)
    s = build(student, CLASSES)
    return Setup(s, t, probe(s, SIZE), probe(t, SIZE), loader().labels, batch_size=8)


def make(name: str, overrides: Mapping[str, Any] = {}, teacher: str = TEACHERS[0], seed: int = 0) -> Method:
    around = setup(teacher, seed)
    return METHODS[name](around, METHODS[name].Config(**(QUICK.get(name, {}) | dict(overrides))))


def train(method: Any, teacher: Net | None, epochs: int = 2, seed: int = 0, **kwargs: Any) -> Trained:
    options = {"optim": Optim(epochs=epochs, lr=0.01, milestones=()), "log": quiet, "watch": silently} | kwargs
    return fit(method, teacher, loader(seed), loader(None), **options)


def fit(
    method: Any,
    teacher: Net | None,
    train: Loader,
    val: Loader,
    optim: Optim,
    log: Log,
    watch: Watch,
    papers_test: Loader | None = None,
) -> Trained:
    """One student by itself."""
    training = Training(method, optim, val, log, papers_test)
    return loop.fit([training], partial(teacher_features, teacher), train, watch)[0]


def quiet(values: Mapping[str, float], epoch: int) -> None:
    pass


def silently(batches: Iterable[Batch], phase: str, epoch: int, epochs: int, first: int = 0) -> Iterator[Batch]:
    yield from batches


def state(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in net.state_dict().items()}


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
