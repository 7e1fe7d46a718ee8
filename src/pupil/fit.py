"""The only training loop.  It knows batches, terms and phases; it knows no method, no MLflow, no DVC and no Hydra."""

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LambdaLR, LRScheduler, MultiStepLR

from pupil import distributed
from pupil.dot import DOT
from pupil.methods.base import Answers, Loss, Measure, Phase
from pupil.net import Net, evaluating
from pupil.types import Batch, Features, Loader, Terms, UserError

Log = Callable[[Mapping[str, float], int], None]  # values, epoch (counted over all phases)
Watch = Callable[[Iterable[Batch], str, int, int], Iterator[Batch]]  # batches, phase, epoch, epochs: a progress bar
State = dict[str, Tensor]
LOOKS = 10  # times in a phase that the terms' gradients are measured


class Trainable(Protocol):
    """A method, or a network alone."""

    student: Net

    def phases(self) -> list[Phase]: ...
    def observed(self) -> dict[str, Tensor]: ...
    def answers(self) -> Answers: ...
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
    optimizer: str = "sgd"  # or dot, with momentum - dot_delta for the task and momentum + dot_delta for the teacher
    dot_delta: float = 0.075


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
        decides = "val/top1" if phase.best_by is None else f"val/{phase.best_by[0]}"
        for epoch in range(1, epochs + 1):
            done += 1
            start = time.perf_counter()
            look = (epoch - 1) % max(1, epochs // LOOKS) == 0
            batches = watch(train.epoch(done), phase.name, epoch, epochs)
            raws, weights, norms = run_epoch(method, teacher, phase, batches, optimizer, look)
            values = summary(raws, weights, phase, epoch)
            values |= {f"{phase.name}/gradient/{name}": norm.item() for name, norm in norms.items()}
            values |= {f"{phase.name}/{name}": x.item() for name, x in method.observed().items() if x.dim() == 0}
            values["lr"] = optimizer.param_groups[0]["lr"]
            values["images_per_second"] = train.samples / (time.perf_counter() - start)
            values |= {f"val/{name}": v for name, v in score(method.student, val, phase.best_by).items()}
            values |= {f"val/{name}/top1": v for name, v in score_answers(method, val).items()}
            if values[decides] >= best_val:  # of equals the later
                best_val, best_epoch, best = values[decides], done, snapshot(method.student)
            if papers_test is not None:
                values["papers_protocol/test_top1"] = score(method.student, papers_test)["top1"]
                best_test = max(best_test or 0.0, values["papers_protocol/test_top1"])
            log(values, done)
            scheduler.step()
        if phase.best_by is not None:
            method.student.load_state_dict(best)
    method.requires_grad_(False).eval()
    return Trained(snapshot(method.student), best, best_epoch, best_test)


def run_epoch(
    method: Trainable,
    teacher: Net | None,
    phase: Phase,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    look: bool = False,
) -> tuple[Tensor, dict[str, float], dict[str, Tensor]]:
    """One pass over the training set: raw terms (steps, terms), still on the device, and name -> weight.

    `look`: gives the first batch's gradient norms too, which cost a backward pass per term.
    """
    raws: list[Tensor] = []
    terms: Terms = {}
    norms: dict[str, Tensor] = {}
    for batch in batches:
        terms = step(method, teacher_features(teacher, batch), batch, phase, optimizer, norms if look and not raws else None)
        raws.append(torch.stack([term.raw.detach() for term in terms.values()]))
    return torch.stack(raws), {name: term.weight for name, term in terms.items()}, norms


def step(
    method: Trainable,
    t: Features | None,
    batch: Batch,
    phase: Phase,
    optimizer: torch.optim.Optimizer,
    norms: dict[str, Tensor] | None = None,
) -> Terms:
    """One descent; `norms` is filled with the weighted terms' gradient norms, if given."""
    terms = method(batch, t, phase.loss)
    if norms is not None:
        norms |= gradient_norms(terms, method.student)
    if isinstance(optimizer, DOT):
        optimizer.descend(terms)
    else:
        optimizer.zero_grad(set_to_none=True)
        torch.stack([term.weight * term.raw for term in terms.values()]).sum().backward()
        distributed.average_gradients(optimizer)
        optimizer.step()
    return terms


def gradient_norms(terms: Terms, student: Net) -> dict[str, Tensor]:
    """Of each weighted term that reaches the student's stem and stages, the norm of its gradient there."""
    trunk = [p for module in (student.stem, student.stages) for p in module.parameters() if p.requires_grad]
    norms = {}
    for name, term in terms.items():
        if trunk and term.raw.requires_grad:
            found = torch.autograd.grad(term.weight * term.raw, trunk, retain_graph=True, allow_unused=True)
            found = [g.norm() for g in distributed.average(found) if g is not None]
            norms[name] = torch.stack(found or [torch.zeros(())]).norm()
    return norms


@torch.no_grad()
def teacher_features(teacher: Net | None, batch: Batch) -> Features | None:
    return None if teacher is None else teacher.features(batch.images)


def refuse_batch_of_one(
    method: Trainable, teacher: Net | None, images: int, image_size: int, batch_size: int, key: str
) -> None:
    """Refuses a training with a batch of one image where a batch norm needs more; found by trying it on a copy."""
    if batch_size > 1 and images % batch_size != 1:
        return
    x, zero = torch.zeros(1, 3, image_size, image_size), torch.zeros(1, dtype=torch.int64)
    trial = copy.deepcopy(method)
    with torch.random.fork_rng(devices=[]):
        try:
            t: Any = None if teacher is None else teacher.features(x)
            for phase in trial.phases():
                activate(trial, phase)
                trial(Batch(x, zero, zero, strong=x), t, phase.loss)
        except Exception as e:  # what else stands in the way, the training itself says
            if "more than 1 value per channel" not in str(e):
                return
            fits = next((b for b in range(batch_size + 1, images + 1) if images % b != 1), None)
            advice = "use more training images" if fits is None else f"use {key}={fits}"
            raise UserError(
                f"{key}={batch_size} leaves a batch of one of the {images} training images, and batch norm on 1x1 maps"
                f" cannot train on one image; {advice}"
            ) from None


def activate(method: Trainable, phase: Phase) -> None:
    """What the phase trains is in train mode and gets gradients; nothing else is or does."""
    method.requires_grad_(False).eval().zero_grad()  # those of the phase before are dropped
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
    if optim.optimizer == "dot":
        sgd = DOT(groups, lr, optim.momentum, optim.dot_delta)
    else:
        sgd = torch.optim.SGD(groups, lr, optim.momentum, nesterov=optim.nesterov)
    if phase.constant:
        return sgd, ConstantLR(sgd, 1.0)
    if (phase.schedule or optim.schedule) == "cosine":
        return sgd, CosineAnnealingLR(sgd, phase.epochs or optim.epochs, phase.floor * lr)
    if any(g.early != 1 for g in phase.train):
        return sgd, LambdaLR(sgd, [partial(by_steps, optim, g.early) for g in phase.train])
    return sgd, MultiStepLR(sgd, list(optim.milestones), optim.gamma)


def by_steps(optim: Optim, early: float, done: int) -> float:
    """What the learning rate is multiplied by after so many epochs."""
    drops = sum(milestone <= done for milestone in optim.milestones)
    return optim.gamma**drops if drops else early


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
    return {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in net.state_dict().items()}


def score(net: Net, batches: Loader, measure: Measure | None = None) -> dict[str, float]:
    """Top-1 in percent, mean negative log-likelihood in nats, and what `measure` says of the embeddings."""
    logits, labels = predict(net, batches)
    nll = nn.functional.cross_entropy(logits, labels).item()
    values = {"top1": 100 * (logits.argmax(1) == labels).double().mean().item(), "nll": nll}
    if measure is not None:
        values[measure[0]] = measure[1](*outputs(net, batches, lambda images: net.features(images).embedding))
    return values


def score_answers(method: Trainable, batches: Loader) -> dict[str, float]:
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
