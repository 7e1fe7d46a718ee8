"""The only training loop.  It knows batches, terms and phases; it knows no method, no MLflow, no DVC and no Hydra."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR

from pupil.methods.base import Loss, Phase
from pupil.net import Net, evaluating
from pupil.types import Batch, Features, Loader, Terms, UserError

Log = Callable[[Mapping[str, float], int], None]  # values, epoch (counted over all phases)
Watch = Callable[[Iterable[Batch], str, int, int], Iterator[Batch]]  # batches, phase, epoch, epochs: a progress bar
State = dict[str, Tensor]


class Trainable(Protocol):
    """A method, or a network alone."""

    student: Net

    def phases(self) -> list[Phase]: ...
    def requires_grad_(self, requires_grad: bool = True) -> nn.Module: ...
    def eval(self) -> nn.Module: ...
    def __call__(self, batch: Batch, t: Any, loss: Loss) -> Terms: ...


@dataclass(frozen=True)
class Optim:
    """SGD and its schedule, the same for every parameter unless a method's group says otherwise."""

    epochs: int = 240
    batch_size: int = 64
    lr: float = 0.05
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    schedule: str = "step"  # step | cosine
    milestones: tuple[int, ...] = (150, 180, 210)  # the drop takes effect in the epoch after
    gamma: float = 0.1


class Trained(NamedTuple):
    """The weights that training leaves: of the last epoch, and of the best one by a split."""

    last: State
    best_by_val: State
    best_epoch: int
    best_on_test: float | None  # top-1 in percent; the papers' protocol, only where asked for


def fit(
    method: Trainable,
    teacher: Net | None,
    train: Loader,
    val: Loader,
    optim: Optim,
    log: Log,
    watch: Watch,
    papers_test: Loader | None = None,
) -> Trained:
    """Train `method.student` through every phase of `method`.

    After each epoch top-1 and NLL on `val` are logged; `papers_test`, if given, is read after each epoch as well, which
    is what most papers do and report the best of.
    """
    best, best_epoch, best_val, best_test, done = {}, 0, -1.0, None, 0
    for phase in method.phases():
        if phase.before is not None:
            phase.before(train.epoch(0))
        activate(method, phase)
        optimizer, scheduler = make_optimizer(phase, optim)
        epochs = phase.epochs or optim.epochs
        best_val = -1.0  # an earlier phase's best is not the best of a trained student
        for epoch in range(1, epochs + 1):
            done += 1
            start = time.perf_counter()
            raws, weights = run_epoch(method, teacher, phase, watch(train.epoch(done), phase.name, epoch, epochs), optimizer)
            values = summary(raws, weights, phase, epoch)
            values["lr"] = optimizer.param_groups[0]["lr"]
            values["images_per_second"] = train.samples / (time.perf_counter() - start)
            values |= {f"val/{name}": v for name, v in score(method.student, val).items()}
            if values["val/top1"] >= best_val:  # of equals the later
                best_val, best_epoch, best = values["val/top1"], done, snapshot(method.student)
            if papers_test is not None:
                values["papers_protocol/test_top1"] = score(method.student, papers_test)["top1"]
                best_test = max(best_test or 0.0, values["papers_protocol/test_top1"])
            log(values, done)
            scheduler.step()
    method.requires_grad_(False).eval()
    return Trained(snapshot(method.student), best, best_epoch, best_test)


def run_epoch(
    method: Trainable, teacher: Net | None, phase: Phase, batches: Iterable[Batch], optimizer: torch.optim.Optimizer
) -> tuple[Tensor, dict[str, float]]:
    """One pass over the training set: raw terms (steps, terms), still on the device, and name -> weight."""
    raws: list[Tensor] = []
    terms: Terms = {}
    for batch in batches:
        terms = step(method, teacher_features(teacher, batch), batch, phase, optimizer)
        raws.append(torch.stack([term.raw.detach() for term in terms.values()]))
    return torch.stack(raws), {name: term.weight for name, term in terms.items()}


def step(method: Trainable, t: Features | None, batch: Batch, phase: Phase, optimizer: torch.optim.Optimizer) -> Terms:
    terms = method(batch, t, phase.loss)
    optimizer.zero_grad(set_to_none=True)
    torch.stack([term.weight * term.raw for term in terms.values()]).sum().backward()
    optimizer.step()
    return terms


@torch.no_grad()
def teacher_features(teacher: Net | None, batch: Batch) -> Features | None:
    return None if teacher is None else teacher.features(batch.images)


def activate(method: Trainable, phase: Phase) -> None:
    """What the phase trains is in train mode and gets gradients; nothing else is or does."""
    method.requires_grad_(False).eval()
    for group in phase.train:
        group.module.requires_grad_(True).train()


def make_optimizer(phase: Phase, optim: Optim) -> tuple[torch.optim.Optimizer, LRScheduler]:
    lr = optim.lr if phase.lr is None else phase.lr
    groups = [
        {
            "params": [p for p in g.module.parameters() if p.requires_grad],
            "lr": lr * g.lr_scale,
            "weight_decay": optim.weight_decay if g.weight_decay is None else g.weight_decay,
        }
        for g in phase.train
    ]
    sgd = torch.optim.SGD(groups, lr, optim.momentum, nesterov=optim.nesterov)
    if optim.schedule == "cosine":
        return sgd, CosineAnnealingLR(sgd, phase.epochs or optim.epochs)
    return sgd, MultiStepLR(sgd, list(optim.milestones), optim.gamma)


def summary(raws: Tensor, weights: dict[str, float], phase: Phase, epoch: int) -> dict[str, float]:
    """Means over the epoch, with one host synchronisation.  A term that is no number ends the training here."""
    raws = raws.cpu()
    bad = torch.nonzero(~raws.isfinite())
    if len(bad):  # the first step's first: what follows is its doing
        at, term = bad[0].tolist()
        raise UserError(
            f"the loss term {list(weights)[term]!r} became {raws[at, term].item()} in step {at + 1} of epoch {epoch}"
            f" of phase {phase.name!r}; try a smaller lr"
        )
    means = dict(zip(weights, raws.double().mean(0).tolist(), strict=True))
    values = {f"{phase.name}/{name}": weights[name] * raw for name, raw in means.items()}
    values |= {f"{phase.name}/raw/{name}": raw for name, raw in means.items()}
    values[f"{phase.name}/loss"] = sum(weights[name] * raw for name, raw in means.items())
    return values


def snapshot(net: nn.Module) -> State:
    return {key: value.detach().cpu().clone() for key, value in net.state_dict().items()}


def score(net: nn.Module, batches: Loader) -> dict[str, float]:
    """Top-1 in percent and mean negative log-likelihood in nats."""
    logits, labels = predict(net, batches)
    nll = nn.functional.cross_entropy(logits, labels).item()
    return {"top1": 100 * (logits.argmax(1) == labels).double().mean().item(), "nll": nll}


@torch.inference_mode()
def predict(net: nn.Module, batches: Loader) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and labels (N,) of a split in its own order, on the CPU; the network's mode is left as it was."""
    with evaluating(net):
        pairs = [(net(b.images).float(), b.labels) for b in batches.epoch(0)]
    logits, labels = torch.cat([z for z, _ in pairs]).cpu(), torch.cat([y for _, y in pairs]).cpu()
    assert len(labels) == batches.samples, "every sample is counted once"
    return logits, labels
