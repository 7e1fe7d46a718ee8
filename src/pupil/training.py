"""One student on its way through the phases of its method: what is trained, measured, and kept to go on from."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pupil.draws import Stream
from pupil.fit import Log, Trainable, Trained, activate, step
from pupil.methods.base import Phase
from pupil.optim import Optim, make_optimizer
from pupil.scoring import score, score_answers, snapshot
from pupil.state import moved, remembered, restore_optimizer, tensors
from pupil.types import Batch, Features, Loader, UserError

LOOKS = 10  # times in a phase that the terms' gradients are measured
SCHEDULE = {"last_epoch", "_step_count", "_last_lr"}  # of a scheduler, what changes


class NotFinite(UserError):
    """A loss became infinite or no number."""

    def __init__(self, text: str, epoch: int, step: int) -> None:
        super().__init__(text)
        self.epoch, self.step = epoch, step  # over all phases, from 1; within the epoch, from 0


class Training:
    """One student on its way through the phases of its method."""

    def __init__(self, method: Trainable, optim: Optim, val: Loader, log: Log, papers_test: Loader | None = None) -> None:
        """After each epoch top-1 and NLL on `val` are logged; `papers_test`, if given, is read after each epoch as well,
        which is what most papers do and report the best of.  Its random numbers go on from where torch's are now.
        """
        self.method, self.optim, self.val, self.log, self.papers_test = method, optim, val, log, papers_test
        self.phases, self.stream = method.phases(), Stream()
        self.at, self.epoch, self.number, self.steps = 0, 1, 1, 0  # phase; epoch of it; epoch of all; its steps done
        self.optimizer: torch.optim.Optimizer | None = None  # of the phase, once it has begun
        self.best, self.best_epoch, self.best_val, self.best_test = {}, 0, -1.0, None
        self.clear()

    def clear(self) -> None:
        """What is gathered in an epoch: raw terms (terms,) of each step, still on the device; name -> weight; gradients."""
        self.raws: list[Tensor] = []
        self.weights: dict[str, float] = {}
        self.norms: dict[str, Tensor] = {}

    @property
    def finished(self) -> bool:
        return self.at == len(self.phases)

    @property
    def phase(self) -> Phase:
        return self.phases[self.at]

    @property
    def epochs(self) -> int:
        """Of the phase."""
        return self.phase.epochs or self.optim.epochs

    def begin(self, train: Loader) -> None:
        """An epoch, or what remains of it."""
        if self.optimizer is None:
            with self.stream.flowing():
                if self.phase.before is not None:
                    self.phase.before(train.epoch(0))
                self.prepare()
            self.best_val = -1.0  # an earlier phase's best is not the best of a trained student
        self.started, self.first = time.perf_counter(), self.steps

    def prepare(self) -> torch.optim.Optimizer:
        activate(self.method, self.phase)
        self.optimizer, self.scheduler = make_optimizer(self.phase, self.optim)
        return self.optimizer

    def step(self, batch: Batch, t: Features | None) -> None:
        assert self.optimizer is not None
        look = self.steps == 0 and (self.epoch - 1) % max(1, self.epochs // LOOKS) == 0
        with self.stream.flowing():
            terms = step(self.method, t, batch, self.phase, self.optimizer, self.norms if look else None)
        self.raws.append(torch.stack([term.raw.detach() for term in terms.values()]))
        self.weights = {name: term.weight for name, term in terms.items()}
        self.steps += 1

    def end(self, train: Loader) -> None:
        """The epoch: measure, log, and go on to the next one."""
        assert self.optimizer is not None
        phase, method, done = self.phase, self.method, self.number
        values = self.summary()
        values |= {f"{phase.name}/gradient/{name}": norm.item() for name, norm in self.norms.items()}
        values |= {f"{phase.name}/{name}": x.item() for name, x in method.observed().items() if x.dim() == 0}
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        share = 1 - self.first / max(1, len(train))
        values["images_per_second"] = share * train.samples / (time.perf_counter() - self.started)
        with self.stream.flowing():
            values |= {f"val/{name}": v for name, v in score(method.student, self.val, phase.best_by).items()}
            values |= {f"val/{name}/top1": v for name, v in score_answers(method, self.val).items()}
        decides = values["val/top1" if phase.best_by is None else f"val/{phase.best_by[0]}"]
        if decides >= self.best_val:  # of equals the later
            self.best_val, self.best_epoch, self.best = decides, done, snapshot(method.student)
        if self.papers_test is not None:
            values["papers_protocol/test_top1"] = score(method.student, self.papers_test)["top1"]
            self.best_test = max(self.best_test or 0.0, values["papers_protocol/test_top1"])
        self.log(values, done)
        self.scheduler.step()
        self.clear()
        self.epoch, self.number, self.steps = self.epoch + 1, self.number + 1, 0
        if self.epoch > self.epochs:
            if phase.best_by is not None:
                method.student.load_state_dict(self.best)
            self.at, self.epoch, self.optimizer = self.at + 1, 1, None

    def summary(self) -> dict[str, float]:
        """Means over the epoch, with one host synchronisation.  A term that is no number ends the training here."""
        raws, name, means = torch.stack(self.raws).cpu(), self.phase.name, {}
        bad = torch.nonzero(~raws.isfinite())
        if len(bad):  # the first step's first: what follows is its doing
            at, term = bad[0].tolist()
            raise NotFinite(
                f"the loss term {list(self.weights)[term]!r} became {raws[at, term].item()} in step {at + 1} of epoch"
                f" {self.epoch} of phase {name!r}; try a smaller lr",
                self.number,
                at,
            )
        means = dict(zip(self.weights, raws.double().mean(0).tolist(), strict=True))
        values = {f"{name}/{term}": self.weights[term] * raw for term, raw in means.items()}
        values |= {f"{name}/raw/{term}": raw for term, raw in means.items()}
        values[f"{name}/loss"] = sum(self.weights[term] * raw for term, raw in means.items())
        return values

    def refuse_infinite(self) -> None:
        """A step of finite terms may leave weights that are no numbers."""
        found = [(name, p.detach().isfinite().all()) for name, p in self.method.named_parameters() if p.requires_grad]
        bad = torch.stack([whole for _, whole in found]).logical_not().cpu()
        if bad.any():
            raise NotFinite(
                f"{found[int(bad.nonzero()[0])][0]!r} became infinite or no number in or before step {self.steps} of epoch"
                f" {self.epoch} of phase {self.phase.name!r}; try a smaller lr",
                self.number,
                self.steps - 1,
            )

    def trained(self) -> Trained:
        self.method.requires_grad_(False).eval()
        return Trained(snapshot(self.method.student), self.best, self.best_epoch, self.best_test)

    def state(self) -> dict[str, Any]:
        """All that training changes: nested dicts and lists of tensors and plain values."""
        if self.raws:
            self.summary()  # a state that is no number is not worth keeping
            self.refuse_infinite()
        return {
            "tensors": {name: tensor.detach() for name, tensor in tensors(self.method)},
            "remembered": {place: getattr(module, name) for place, module, name in remembered(self.method)},
            "place": [self.at, self.epoch, self.number, self.steps],
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "schedule": {k: self.scheduler.state_dict()[k] for k in SCHEDULE if self.optimizer is not None},
            "random": self.stream.state,
            "best": [self.best, self.best_epoch, self.best_val, self.best_test],
            "epoch": [torch.stack(self.raws) if self.raws else None, self.weights, self.norms],
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state` of the same training."""
        self.at, self.epoch, self.number, self.steps = state["place"]
        if state["optimizer"] is not None:
            restore_optimizer(self.prepare(), state["optimizer"])
            self.scheduler.__dict__.update(state["schedule"])
        found = dict(tensors(self.method))
        assert found.keys() == state["tensors"].keys()
        for name, value in state["tensors"].items():
            found[name].copy_(value)
        device = next(self.method.student.parameters()).device
        for place, module, name in remembered(self.method):
            setattr(module, name, moved(device, state["remembered"][place]))
        self.stream.state = dict(state["random"])
        self.best, self.best_epoch, self.best_val, self.best_test = state["best"]
        raws, self.weights, norms = state["epoch"]
        self.raws = [] if raws is None else list(raws.to(device))
        self.norms = moved(device, norms)
