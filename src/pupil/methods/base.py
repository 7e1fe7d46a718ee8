"""What a distillation method is.

A method overrides the narrowest of three hooks that fits:

    match      one spot        the loss between one student tensor and one teacher tensor
    knowledge  all features    by default the sum of `match` over the method's spots
    loss       everything      by default  ce * CE + kl * KL(T) + beta * knowledge

and may deploy something else than the plain student (`deployed`) or add phases.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pupil.methods.functions import kl
from pupil.net import FrozenLinear, Net
from pupil.types import Batch, Features, Term, Terms, UserError


@dataclass(frozen=True)
class Setup:
    """Everything a method may know before the first batch."""

    student: Net
    teacher: Net  # frozen and in eval mode
    s: Features  # of one image: the shapes
    t: Features
    labels: Tensor  # (N,) training labels
    batch_size: int = 64  # as configured; the last batch of an epoch may be smaller


Loss = Callable[[Features, Features, Batch], Terms]
Answers = Mapping[str, Callable[[Tensor], Tensor]]  # name -> from images (B, 3, H, W) to logits (B, K)
Measure = tuple[str, Callable[[Tensor, Tensor], float]]  # its name; (N, D) embeddings and (N,) labels -> more is better


class Sheet(NamedTuple):
    """Training images, with what is to be said of each below its class."""

    title: str
    ids: Tensor  # (n,) positions in the training set
    captions: Sequence[str]


class Chart(NamedTuple):
    """A matrix as colours."""

    title: str
    matrix: Tensor  # (H, W)
    rows: Sequence[str]  # their names
    columns: str  # what the columns, from 1, are
    limits: tuple[float, float] | None = None  # values of the darkest and the lightest colour; None: those there are


Pictures = Mapping[str, Sheet | Chart]  # by the name of the file


class Group(NamedTuple):
    """Parameters that are trained together."""

    module: nn.Module
    lr_scale: float = 1.0
    weight_decay: float | None = None  # None: the optimiser's
    early: float = 1.0  # times the learning rate until a schedule by steps first drops


class Phase(NamedTuple):
    """A stretch of training with its own loss, trained modules and length."""

    name: str
    loss: Loss
    train: Sequence[Group]
    epochs: int | None = None  # None: as configured
    lr: float | None = None
    before: Callable[[Iterable[Batch]], None] | None = None  # one look at the training set
    constant: bool = False  # whether the learning rate stays where it is
    schedule: str | None = None  # step | cosine; None: as configured
    floor: float = 0.0  # where a cosine ends, as a share of the learning rate it starts from
    best_by: Measure | None = None  # on the validation images; the phase then leaves the student of its best epoch


class Method(nn.Module):
    """Plain distillation; every method is a subclass and lives in a file of its own.

    What is trained is what is deployed: `self.student` is the network that leaves the training.
    """

    paper: ClassVar[str] = ""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # named settings of other suites and pairs, over the defaults
    on_logits: ClassVar[bool] = False  # whether all its terms read labels and logits alone, so that it can be wrapped
    needs_same_classes: ClassVar[bool] = True  # whether a term other than kl relates the teacher's classes to the student's
    remembers: ClassVar[Sequence[str]] = ()  # attributes that change in training and are neither parameters nor buffers
    two_views: bool = False  # whether it wants a second, strongly augmented view of each image

    @dataclass(frozen=True)
    class Config:
        """Weights of the three terms and the temperature of the second."""

        preset: str = "default"  # or one of `presets`; a value that is given itself wins over the preset's
        ce: float = 1.0  # weight of cross-entropy
        kl: float = 0.0  # weight of the softened KL
        T: float = 4.0  # temperature
        beta: float = 0.0  # weight of the method's own term
        head: str = "own"  # the student's classifier: own, init (starts as the teacher's) or frozen (is the teacher's)

    spots: Sequence[int] = ()  # indices into Features.taps; negative counts from the deep end

    def __init__(self, setup: Setup, hp: Any) -> None:
        super().__init__()
        own = (type(self).match, type(self).knowledge, type(self).loss)
        if hp.beta and own == (Method.match, Method.knowledge, Method.loss):
            name = type(self).__name__.lower()
            raise UserError(f"{name} has no term of its own to weigh: hp.{name}.beta must be 0, got {hp.beta}")
        self.setup, self.hp = setup, hp
        self.surgery = self.plan(setup, hp)
        self.student = self.deployed(setup.student, **self.surgery)
        if hp.head != "own":
            self.student.head = borrowed_head(type(self).__name__.lower(), self.student, setup, hp.head)

    @property
    def teacher(self) -> Net:  # context, not a part: never trained, moved, saved or wrapped
        return self.setup.teacher

    @classmethod
    def plan(cls, setup: Setup, hp: Any) -> dict[str, Any]:
        """The arguments of `deployed`: plain values, they go into the checkpoint."""
        return {}

    @staticmethod
    def deployed(net: Net) -> Net:
        """What leaves the training, built around the plain student; its weights come from the checkpoint."""
        return net

    @classmethod
    def crosses_tasks(cls, hp: Any) -> bool:
        """Whether a teacher of other classes can teach with these weights."""
        return not cls.needs_same_classes and not hp.kl and hp.head == "own"

    def match(self, i: int, f_s: Tensor, f_t: Tensor, batch: Batch) -> Tensor:
        """The loss of spot i: a scalar."""
        raise NotImplementedError

    def compared(self, s: Features, t: Features) -> list[tuple[Any, Any]]:
        """What `match` compares at each spot: tensors, or tuples of them, whose rows are those of the batch.

        By default the taps.  Adapters with a batch norm belong here: SAKD matches some of the rows, and they see them all.
        """
        return [(s.taps[spot], t.taps[spot]) for spot in self.spots]

    def knowledge(self, s: Features, t: Features, batch: Batch) -> Tensor:
        """The method's own loss: a scalar."""
        return torch.stack([self.match(i, *pair, batch) for i, pair in enumerate(self.compared(s, t))]).sum()

    def loss(self, s: Features, t: Features, batch: Batch) -> Terms:
        terms = self.usual(s, t, batch)
        if self.hp.beta:
            terms["knowledge"] = Term(self.knowledge(s, t, batch), self.hp.beta)
        return terms

    def usual(self, s: Features, t: Features, batch: Batch) -> Terms:
        """The terms that every method has: ce and kl, where they have a weight."""
        hp, terms = self.hp, {}
        if hp.ce:
            terms["ce"] = Term(F.cross_entropy(s.logits.float(), batch.labels), hp.ce)
        if hp.kl:
            terms["kl"] = Term(kl(s.logits, t.logits, hp.T), hp.kl)
        return terms

    def phases(self) -> list[Phase]:
        return [Phase("distil", self.loss, [Group(self)])]

    def observed(self) -> dict[str, Tensor]:
        """What the method shows of its state after an epoch: scalars as metrics, (H, W) matrices as pictures."""
        return {}

    def answers(self) -> Answers:
        """Other answers than the student's that are worth scoring, on the validation images after each epoch and at the end."""
        return {}

    def pictures(self) -> Pictures:
        """What the method has to show at the end of the training."""
        return {}

    def forward(self, batch: Batch, t: Features, loss: Loss) -> Terms:
        return loss(self.student.features(batch.images), t, batch)


def paired_maps(s: Features, t: Features) -> list[tuple[Tensor, Tensor]]:
    """(student's, teacher's) map of each stage that both have, shallow to deep; the surplus of one is left out."""
    return list(zip(s.maps, t.maps, strict=False))


def paired_spots(name: str, setup: Setup) -> Sequence[int]:
    """The `spots` of those maps; refuses a pair without any."""
    needs_maps(name, setup)
    return range(1, 1 + len(paired_maps(setup.s, setup.t)))


def encoder(net: Net) -> nn.ModuleList:
    """What makes the maps: stem and stages, without the norm and the activation that follow a signed last map."""
    *rest, last = net.stages
    return nn.ModuleList([net.stem, *rest, last if last.norm is None else last.blocks])  # type: ignore[list-item]


def same_width(name: str, setup: Setup, advice: str) -> None:
    """Refuses a pair whose embeddings differ in width."""
    w_s, w_t = setup.s.embedding.shape[1], setup.t.embedding.shape[1]
    if w_s != w_t:
        raise UserError(f"{name}: the embeddings of student and teacher must be equally wide, got {w_s} and {w_t}; {advice}")


def borrowed_head(name: str, student: Net, setup: Setup, head: str) -> nn.Module:
    """The teacher's classifier for the student: the start of its own (`init`) or a frozen copy (`frozen`)."""
    if isinstance(student.head, FrozenLinear):
        raise UserError(f"{name} deploys the teacher's classifier anyway; hp.{name}.head must be own, got {head}")
    lent = FrozenLinear.of(setup.teacher.head)
    ours, theirs = ([tuple(v.shape) for v in m.state_dict().values()] for m in (student.head, lent))
    if ours != theirs:
        raise UserError(
            f"{name}: hp.{name}.head={head} needs classifiers of equal shape, weight and bias, got {ours} for the student and"
            f" {theirs} for the teacher; use hp.{name}.head=own or a pair of equal width"
        )
    if head == "frozen":
        return lent
    student.head.load_state_dict(lent.state_dict())
    return student.head


def needs_maps(name: str, setup: Setup) -> None:
    """Refuses a pair where a network gives no maps."""
    for role, net, f in (("student", setup.student, setup.s), ("teacher", setup.teacher, setup.t)):
        if not f.maps:
            raise UserError(
                f"{name} needs feature maps, and the {role} {net.name} gives none at this image size;"
                " use a method on logits or embeddings: kd, thkd, crd"
            )
