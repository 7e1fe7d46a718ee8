"""The only training loop.  It knows batches, terms and phases; it knows no method, no MLflow, no DVC and no Hydra.

Several students may be trained side by side on the same batches and one pass of the teacher: each has its own random
stream, and so the numbers that it would have alone.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pupil import distributed
from pupil.dot import DOT
from pupil.lanes import Turns
from pupil.methods.base import Answers, Loss, Phase
from pupil.net import Net
from pupil.types import Batch, Features, Loader, Terms, UserError

if TYPE_CHECKING:
    from pupil.training import Training

Log = Callable[[Mapping[str, float], int], None]  # values, epoch (counted over all phases)
Watch = Callable[[Iterable[Batch], str, int, int, int], Iterator[Batch]]  # batches, phase, epoch, epochs, steps left out
Teach = Callable[[Batch], Features | None]  # what the teacher says of a batch
State = dict[str, Tensor]


class Trainable(Protocol):
    """A method, or a network alone."""

    student: Net

    def phases(self) -> list[Phase]: ...
    def observed(self) -> dict[str, Tensor]: ...
    def answers(self) -> Answers: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...
    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...
    def requires_grad_(self, requires_grad: bool = True) -> nn.Module: ...
    def eval(self) -> nn.Module: ...
    def __call__(self, batch: Batch, t: Any, loss: Loss) -> Terms: ...


class Trained(NamedTuple):
    """The weights that training leaves: of the last epoch, and of the best one by a split."""

    last: State
    best_by_val: State
    best_epoch: int
    best_on_test: float | None  # top-1 in percent; the papers' protocol, only where asked for


def fit(
    trainings: Sequence["Training"],
    teach: Teach,
    train: Loader,
    watch: Watch,
    point: Callable[[], None] = lambda: None,
    lanes: Turns = Turns(),
) -> list[Trained]:
    """Train each student through every phase of its method, from where it is; `lanes` says how they take their steps.

    `point` is called between two steps, before the first and after each epoch: what `Training.state` gives is then whole.
    """
    while alive := [training for training in trainings if not training.finished]:
        longest = max(alive, key=lambda training: training.epochs)
        number, first = alive[0].number, alive[0].steps
        assert {(number, first)} == {(training.number, training.steps) for training in alive}, "all see the same batch"
        for training in alive:
            training.begin(train)
        point()
        batches = train.epoch(number, first)
        for batch in watch(batches, longest.phase.name, longest.epoch, longest.epochs, first):
            lanes.begin()
            t = teach(batch)
            for lane, training in enumerate(alive):
                with lanes.lane(lane):
                    training.step(batch, t)
            lanes.end()
            point()
        for training in alive:
            training.end(train)
    point()
    return [training.trained() for training in trainings]


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
