"""The training loop: its numbers, its phases, its refusals."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pupil.fit import Trained, step
from pupil.methods.alone import Alone, cross_entropy
from pupil.methods.base import Answers, Group, Loss, Phase
from pupil.models import build
from pupil.net import Net, Stage
from pupil.optim import Optim, make_optimizer
from pupil.scoring import predict, score
from pupil.types import Batch, Features, Term, Terms, UserError
from tests import tiny


class Journal:
    """What a run logs, and what it shows."""

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []
        self.epochs: list[int] = []
        self.shown: list[tuple[str, int, int]] = []

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        self.values.append(dict(values))
        self.epochs.append(epoch)

    def watch(self, batches: Iterable[Batch], phase: str, epoch: int, epochs: int, first: int = 0) -> Iterator[Batch]:
        self.shown.append((phase, epoch, epochs))
        yield from batches


def linear_net() -> Net:
    """Without batch norm: at a learning rate of zero nothing at all changes."""
    torch.manual_seed(0)
    return Net(nn.Conv2d(3, 4, 3, bias=False), [Stage(nn.Identity(), act=nn.ReLU())], nn.Linear(4, tiny.CLASSES))


def run(net: Net, optim: Optim, journal: Journal | None = None, **kwargs: Any) -> Trained:
    journal = journal or Journal()
    options = {"watch": journal.watch, "log": journal.log} | kwargs
    return tiny.fit(Alone(net), None, tiny.loader(), tiny.loader(None), optim, **options)


# --- schedule and optimiser --------------------------------------------------------------------------------------------


def test_milestone_takes_effect_in_the_epoch_after() -> None:
    journal = Journal()
    run(linear_net(), Optim(epochs=6, lr=0.5, milestones=(2, 4), gamma=0.1), journal)
    assert [v["lr"] for v in journal.values] == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005, 0.005])
    assert journal.epochs == [1, 2, 3, 4, 5, 6]


def test_cosine_goes_from_the_full_rate_towards_zero() -> None:
    journal = Journal()
    run(linear_net(), Optim(epochs=5, lr=0.4, schedule="cosine"), journal)
    expected = [0.4 * (1 + math.cos(math.pi * e / 5)) / 2 for e in range(5)]
    assert [v["lr"] for v in journal.values] == pytest.approx(expected)


def test_groups_have_their_own_rate_and_decay() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    phase = Phase("p", cross_entropy, [Group(a), Group(b, lr_scale=0.1, weight_decay=0.0)], lr=2.0)
    optimizer, _ = make_optimizer(phase, Optim(lr=0.05, momentum=0.8, weight_decay=0.3, nesterov=True))
    first, second = optimizer.param_groups
    assert (first["lr"], first["weight_decay"], first["momentum"], first["nesterov"]) == (2.0, 0.3, 0.8, True)
    assert (second["lr"], second["weight_decay"], second["momentum"]) == (0.2, 0.0, 0.8)
    assert [id(p) for p in second["params"]] == [id(p) for p in b.parameters()]


class Slope(nn.Module):
    """One weight with a loss whose gradient is always 3."""

    def __init__(self) -> None:
        super().__init__()
        self.student = linear_net()
        self.w = nn.Parameter(torch.tensor(1.0))

    def forward(self, batch: Batch, t: Features | None, loss: Loss) -> Terms:
        return {"slope": Term(1.5 * self.w, 2.0)}


def test_step_is_momentum_sgd_with_weight_decay() -> None:
    method = Slope()
    phase = Phase("p", cross_entropy, [Group(method)])
    optimizer, _ = make_optimizer(phase, Optim(lr=0.1, momentum=0.9, weight_decay=0.5))
    w, v = 1.0, 0.0
    for _ in range(4):
        step(method, None, tiny.first_batch(), phase, optimizer)
        v = 0.9 * v + (3.0 + 0.5 * w)
        w -= 0.1 * v
        assert method.w.item() == pytest.approx(w, rel=1e-5)


def test_logged_terms_are_means_over_the_epoch_and_add_up() -> None:
    journal, net = Journal(), linear_net()
    batches = list(tiny.loader().epoch(1))
    with torch.no_grad():
        raws = [nn.functional.cross_entropy(net(b.images), b.labels).item() for b in batches]
    run(net, Optim(epochs=1, lr=0.0), journal)
    (values,) = journal.values
    assert values["train/raw/ce"] == pytest.approx(sum(raws) / len(raws), rel=1e-5)
    assert values["train/loss"] == pytest.approx(values["train/ce"])
    assert values["images_per_second"] > 0


# --- phases ------------------------------------------------------------------------------------------------------------


class TwoPhases(nn.Module):
    """Warms up an adapter for two epochs, then trains the student alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = build("resnet8", tiny.CLASSES)
        self.adapter = nn.Sequential(nn.Linear(64, 3), nn.BatchNorm1d(3))
        self.looked_at: list[int] = []
        self.modes: set[tuple[bool, bool, bool]] = set()

    def observed(self) -> dict[str, Tensor]:
        return {"scale": torch.tensor(3.0), "picture": torch.eye(2)}

    def answers(self) -> Answers:
        return {}

    def phases(self) -> list[Phase]:
        warm = Phase("warm", self.warm, [Group(self.adapter)], epochs=2, lr=0.2, before=self.look)
        return [warm, Phase("main", cross_entropy, [Group(self.student)])]

    def look(self, batches: Iterable[Batch]) -> None:
        self.looked_at += [i for batch in batches for i in batch.ids.tolist()]

    def warm(self, s: Features, t: Features, batch: Batch) -> Terms:
        return {"size": Term(self.adapter(s.embedding).square().mean(), 1.0)}

    def forward(self, batch: Batch, t: Features | None, loss: Loss) -> Terms:
        self.modes.add((loss is cross_entropy, self.student.training, self.adapter.training))
        s = self.student.features(batch.images)
        return loss(s, s, batch)


def test_phase_trains_what_it_lists_and_nothing_else() -> None:
    method, journal = TwoPhases(), Journal()
    student, seen = tiny.state(method.student), []

    def log(values: Mapping[str, float], epoch: int) -> None:
        journal.log(values, epoch)
        seen.append((tiny.state(method.student), tiny.state(method.adapter)))

    trained = tiny.train(method, None, epochs=3, log=log, watch=journal.watch, optim=Optim(epochs=3, lr=0.05, milestones=(2,)))
    assert journal.shown == [("warm", 1, 2), ("warm", 2, 2), ("main", 1, 3), ("main", 2, 3), ("main", 3, 3)]
    assert journal.epochs == [1, 2, 3, 4, 5], "counted over all phases"
    assert [v["lr"] for v in journal.values] == pytest.approx([0.2, 0.2, 0.05, 0.05, 0.005])
    assert "warm/size" in journal.values[0]
    assert "main/ce" in journal.values[2]
    assert sorted(method.looked_at) == list(range(tiny.SAMPLES)), "one look at the whole training set"
    assert method.modes == {(False, False, True), (True, True, False)}
    assert tiny.same(student, seen[1][0]), "bit for bit, statistics of batch norm included"
    assert not tiny.same(student, seen[2][0])
    assert tiny.same(seen[1][1], seen[4][1])
    assert trained.best_epoch >= 3, "the best of a warm-up is not the best of a trained student"
    assert not any(m.training for m in method.modules())
    assert not any(p.requires_grad for p in method.parameters())


def test_batches_of_each_epoch_differ_over_all_phases() -> None:
    numbers: list[int] = []

    def record(batches: Iterable[Batch], phase: str, epoch: int, epochs: int, first: int = 0) -> Iterator[Batch]:
        for batch in batches:
            numbers.append(batch.epoch)
            yield batch

    tiny.train(TwoPhases(), None, epochs=2, watch=record)
    assert sorted(set(numbers)) == [1, 2, 3, 4]


# --- what is kept ------------------------------------------------------------------------------------------------------


class Scripted:
    """Before each epoch gives the student a head that answers one class, and marks its stem with the epoch."""

    def __init__(self, net: Net, answers: list[int]) -> None:
        self.net, self.answers = net, answers

    def watch(self, batches: Iterable[Batch], phase: str, epoch: int, epochs: int, first: int = 0) -> Iterator[Batch]:
        with torch.no_grad():
            self.net.head.weight.zero_()
            self.net.head.bias.copy_(torch.eye(tiny.CLASSES)[self.answers[epoch - 1]])
            self.net.stem.weight.fill_(epoch)
        yield from batches


def labelled(labels: list[int]) -> Any:
    data = tiny.loader(None, samples=len(labels))
    data.labels = torch.tensor(labels)
    return data


def test_best_is_the_later_of_equals() -> None:
    net, val = linear_net(), labelled([0, 0, 0, 1, 1, 2])
    watch = Scripted(net, answers=[1, 0, 2, 0, 1]).watch
    optim, journal = Optim(epochs=5, lr=0.0), Journal()
    trained = tiny.fit(Alone(net), None, tiny.loader(), val, optim, journal.log, watch)
    assert [v["val/top1"] for v in journal.values] == pytest.approx([100 / 3, 50, 100 / 6, 50, 100 / 3])
    assert trained.best_epoch == 4
    assert (trained.best_by_val["stem.weight"] == 4).all()
    assert (trained.last["stem.weight"] == 5).all()
    assert trained.best_on_test is None


def test_papers_protocol_keeps_the_best_on_test_and_changes_nothing_else() -> None:
    net, val, test = linear_net(), labelled([0, 1]), labelled([0, 0, 0, 1])
    optim, journal = Optim(epochs=3, lr=0.0), Journal()
    trained = tiny.fit(Alone(net), None, tiny.loader(), val, optim, journal.log, Scripted(net, [0, 1, 2]).watch, test)
    assert trained.best_on_test == pytest.approx(75.0)
    assert [v["papers_protocol/test_top1"] for v in journal.values] == pytest.approx([75.0, 25.0, 0.0])
    assert trained.best_epoch == 2, "selected on the validation split"


def test_snapshots_share_no_memory_with_the_student() -> None:
    net = linear_net()
    trained = run(net, Optim(epochs=1, lr=0.01, milestones=()))
    kept = {key: value.clone() for key, value in trained.last.items()}
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    assert tiny.same(kept, trained.last)


# --- refusals and scores -----------------------------------------------------------------------------------------------


class Breaks(nn.Module):
    """Its second term becomes `value` in epoch 2; if it is trained on, that spreads into the weights."""

    def __init__(self, value: float, spreads: bool) -> None:
        super().__init__()
        self.student, self.value, self.spreads = linear_net(), value, spreads

    def observed(self) -> dict[str, Tensor]:
        return {}

    def answers(self) -> Answers:
        return {}

    def phases(self) -> list[Phase]:
        return [Phase("second", self.terms, [Group(self.student)])]

    def terms(self, s: Features, t: Features, batch: Batch) -> Terms:
        size = s.logits.square().mean()
        bad = (self.value if batch.epoch == 2 else 1.0) * (size if self.spreads else size.detach())
        return {"fine": Term(size, 1.0), "broken": Term(bad, 0.5)}

    def forward(self, batch: Batch, t: Features | None, loss: Loss) -> Terms:
        s = self.student.features(batch.images)
        return loss(s, s, batch)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_no_number_ends_the_training_with_its_place(value: float) -> None:
    with pytest.raises(UserError) as error:
        tiny.train(Breaks(value, spreads=False), None, epochs=3)
    text = str(error.value)
    assert "\n" not in text
    for part in ("broken", "second", "epoch 2", str(value)):
        assert part in text


def test_term_that_broke_first_is_the_one_that_is_named() -> None:
    with pytest.raises(UserError, match="epoch 2") as error:
        tiny.train(Breaks(math.nan, spreads=True), None, epochs=3)
    assert "'broken'" in str(error.value)


def test_predict_counts_every_sample_in_order_and_leaves_the_modes() -> None:
    net = build("resnet8", tiny.CLASSES).train()
    net.stages[1].eval()
    before, modes = tiny.state(net), [m.training for m in net.modules()]
    data = tiny.loader(None, samples=11, batch_size=4)
    logits, labels = predict(net, data)
    assert [m.training for m in net.modules()] == modes
    assert tiny.same(before, tiny.state(net)), "no statistic moved"
    assert logits.shape == (11, tiny.CLASSES)
    assert torch.equal(labels, data.labels)
    whole = next(iter(tiny.loader(None, samples=11, batch_size=11).epoch(0)))
    with torch.no_grad():
        torch.testing.assert_close(logits.clone(), net.eval()(whole.images))


def test_score_is_top1_in_percent_and_nll_in_nats() -> None:
    net, data = linear_net(), labelled([0, 1, 1])
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.copy_(torch.tensor([2.0, 1.0, 0.0, 0.0]))
    log_z = math.log(math.exp(2) + math.e + 2)
    assert score(net, data) == {"top1": pytest.approx(100 / 3), "nll": pytest.approx(log_z - 4 / 3)}


# --- refactoring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kd", "simkd", "crd"])
def test_five_seeded_steps_are_bit_identical(name: str) -> None:
    def five() -> tuple[list[Tensor], dict[str, Tensor]]:
        method = tiny.make(name)
        torch.manual_seed(0)
        batches = [b for number in (1, 2) for b in tiny.loader().epoch(number)][:5]
        (phase,) = method.phases()
        optimizer, _ = make_optimizer(phase, Optim())
        losses = []
        for batch in batches:
            with torch.no_grad():
                t = method.teacher.features(batch.images)
            terms = step(method, t, batch, phase, optimizer)
            losses.append(torch.stack([term.raw.detach() for term in terms.values()]))
        return losses, tiny.state(method)

    (losses, weights), (again, weights_again) = five(), five()
    assert len(losses) == 5
    assert all(torch.equal(a, b) for a, b in zip(losses, again, strict=True))
    assert tiny.same(weights, weights_again)
