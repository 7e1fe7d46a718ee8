"""REFILLED: teach the student first how images compare with each other, then classes by their centres; of any task.

Paper: Ye, Lu & Zhan, CVPR 2020 (Distilling cross-task knowledge via relationship matching); 2022, arXiv:2205.01915.
Loss: phase "embed": init_beta * KL(teacher || student) over the semi-hard triplets of the batch (anchor a and positive p of
one class, negative n of another, 0 < d_an - d_ap <= margin), with d the distances between unit embeddings of either
network; which triplets, the student's decide.  `mode` triplet: the outcomes sigmoid(+-(d_an - d_ap) / tau), a mean over
twice the triplets; tuple: softmax(-[d_ap, d_an, ...] / tau) over all negatives of a pair (a, p), a mean over the pairs.
Phase "distil": ce * CE + beta * KL(softmax(z_t / T) || softmax(z_s / T)) over the classes in the batch, where z_t = M e_t
and M holds the unit vectors along the classes' mean teacher embeddings: of the training set as augmented (`centres`
global) or of the batch (local).  So the teacher may be of other classes, and of any width.
Another method (`then`, with its own weights and phases) may take the place of "distil"; what it deploys is then taught from
the start, so that SimKD's projector learns in "embed" too.
Trained: in "embed" the student without its classifier; in "distil" the student.  Deployed: the student, or what `then` does.
Defaults: the authors' (200 epochs of "embed" by cosine from 0.1 to 0.01, margin 0.2, tau 4, 1000; then T 2, 100).
Presets: refilled-new with tuples; refilled-paper with local centres.  The authors' second phase is optim with epochs 200,
lr 0.1, schedule step, milestones 100, 140, 180 and gamma 0.2; in both, batches of 128 and nesterov true.  On five
classes of digits (24 images each, lr 0.05) their beta killed the student's last ReLU; 3 and 10 did not.
Phase "distil" starts from the epoch with the best nearest-class-mean accuracy on the validation images, whose centres are
those images' own: of use to compare epochs, too good to report.
Deviations: a batch without triplets gives 0 (the authors': NaN); every epoch of "embed" is a candidate (theirs: every
tenth, on the test images); the global centres are computed in each training (theirs: kept on disk); local centres
are ours by the paper, their released code has none; T is kl's temperature too.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pupil.methods.base import Answers, Group, Loss, Method, Phase, Pictures, Setup
from pupil.methods.functions import product
from pupil.methods.wrapping import known, settings_of
from pupil.net import Net
from pupil.types import Batch, Features, Term, Terms, UserError

FAR = 1e9  # what is left out of a softmax is so much less likely
SHORTEST = 1e-6  # embedding that has a direction


class REFILLED(Method):
    paper = "Ye, Lu & Zhan, CVPR 2020 and arXiv:2205.01915"
    remembers = ("shown",)
    needs_same_classes = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "refilled": {},
        "refilled-new": {"mode": "tuple"},
        "refilled-paper": {"centres": "local"},
    }

    @dataclass(frozen=True)
    class Config(Method.Config):
        beta: float = 100.0
        T: float = 2.0
        centres: str = "global"  # global: of the training set; local: of the batch
        mode: str = "triplet"  # of the first phase: triplet | tuple
        margin: float = 0.2  # how much farther than the positive a negative may be
        tau: float = 4.0  # temperature of the first phase
        init_beta: float = 1000.0  # weight of the first phase
        init_epochs: int = 200  # of the first phase
        init_lr: float = 0.1  # of the first phase; 0: the optimiser's
        then: str = "refilled"  # the method of the second phase; another one's ce, kl, T, beta and head are of then_preset
        then_preset: str = "default"  # of another method

    centres: Tensor  # (K, D_t) of unit norm; zero before the second phase

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        for field, choices in (("mode", ("triplet", "tuple")), ("centres", ("global", "local"))):
            if getattr(hp, field) not in choices:
                raise UserError(f"refilled: hp.refilled.{field} must be {' or '.join(choices)}, got {getattr(hp, field)!r}")
        if min(hp.margin, hp.tau, hp.init_beta) <= 0 or hp.init_epochs < 1 or hp.init_lr < 0:
            values = f"{hp.margin}, {hp.tau}, {hp.init_beta}, {hp.init_epochs} and {hp.init_lr}"
            raise UserError(
                "refilled: hp.refilled.margin, tau, init_beta and init_epochs must be positive, and init_lr positive or 0 for"
                f" the optimiser's, got {values}"
            )
        counts = setup.labels.bincount()
        classes = int((counts > 0).sum())
        if counts.max() < 2 or classes < 2 or setup.batch_size < 3:
            raise UserError(
                f"refilled compares two images of a class with one of another; got batches of {setup.batch_size},"
                f" {classes} classes and at most {int(counts.max())} training images of one; use more images, or kd or fitnet"
            )
        self.register_buffer("centres", torch.zeros(setup.s.logits.shape[1], setup.t.embedding.shape[1]))
        self.shown: dict[str, Tensor] = {}
        self.inner = None if hp.then == "refilled" else second(setup, hp)
        if self.inner is not None:
            self.student, self.two_views = self.inner.student, self.inner.two_views
            self.surgery = {"then": hp.then, **self.inner.surgery} if self.inner.surgery else {}

    @staticmethod
    def deployed(net: Net, then: str = "", **surgery: Any) -> Net:
        """`then`: the method whose surgery it is; none: the plain student."""
        return known("hp.refilled.then", then).deployed(net, **surgery) if then else net

    @classmethod
    def crosses_tasks(cls, hp: Any) -> bool:
        if not super().crosses_tasks(hp) or hp.then == "refilled":
            return super().crosses_tasks(hp)
        key = "hp.refilled.then"
        return known(key, hp.then).crosses_tasks(settings_of(key, hp.then, hp.then_preset))

    def phases(self) -> list[Phase]:
        hp, net = self.hp, self.student
        body = Group(nn.ModuleList([net.stem, net.stages, net.neck, net.pool]))
        best = ("ncm_top1", ncm)
        lr = hp.init_lr or None
        embed = Phase("embed", self.compare, [body], hp.init_epochs, lr, schedule="cosine", floor=0.1, best_by=best)
        own = [Phase("distil", self.loss, [Group(self.student)], before=self.look)]
        return [embed, *(own if self.inner is None else self.inner.phases())]

    def forward(self, batch: Batch, t: Features, loss: Loss) -> Terms:
        if self.inner is None or loss == self.compare:
            return super().forward(batch, t, loss)
        self.shown = {}
        return self.inner(batch, t, loss)

    def compare(self, s: Features, t: Features, batch: Batch) -> Terms:
        """The first phase's loss."""
        d_s, d_t = distances(s.embedding), distances(t.embedding)
        pairs, mined = semi_hard(d_s.detach(), batch.labels, self.hp.margin)
        z_s, z_t = (self.relations(d / self.hp.tau, pairs) for d in (d_s, d_t))
        always = torch.ones_like(mined)
        if self.hp.mode == "triplet":
            kept, number = torch.stack([mined, always], 2), 2 * mined.sum()
        else:
            kept, number = torch.cat([always[:, :1], mined], 1), mined.any(1).sum()
        of_class = (batch.labels[:, None] == batch.labels).sum(1)
        all_triplets = (of_class - 1).mul(len(of_class) - of_class).sum()
        self.shown = {"semi_hard_share": mined.sum() / all_triplets.clamp(min=1)}
        return {"relations": Term(divergence(z_s, z_t, kept) / number.clamp(min=1), self.hp.init_beta)}

    def relations(self, d: Tensor, pairs: Tensor) -> Tensor:
        """(B, B), (P, 2) -> logits: (P, B, 2) of triplets in order or not, or (P, 1 + B) of the positive and all images."""
        a, p = pairs.unbind(1)
        if self.hp.mode == "triplet":
            gap = d[a] - d[a, p][:, None]
            return torch.stack([gap, torch.zeros_like(gap)], 2)
        return -torch.cat([d[a, p][:, None], d[a]], 1)

    @torch.no_grad()
    def look(self, batches: Iterable[Batch]) -> None:
        """The global centres, by one pass over the training set."""
        self.shown = {}
        if self.hp.centres == "global":
            sums = torch.zeros_like(self.centres)
            for batch in batches:
                sums += class_sums(self.teacher.features(batch.images).embedding, batch.labels, len(sums))
            self.centres = F.normalize(sums)
            self.shown = {"cosines_of_class_centres": product(self.centres, self.centres.T)}

    def knowledge(self, s: Features, t: Features, batch: Batch) -> Tensor:
        """The second phase's own term."""
        k = len(self.centres)
        local = self.hp.centres == "local"
        centres = F.normalize(class_sums(t.embedding, batch.labels, k)) if local else self.centres
        present = torch.zeros(k, dtype=torch.bool, device=batch.labels.device).index_fill(0, batch.labels, True)
        z_t = product(t.embedding, centres.T)
        return divergence(s.logits.float() / self.hp.T, z_t / self.hp.T, present) / len(z_t)

    def observed(self) -> dict[str, Tensor]:
        """In the first phase the share of the last batch's triplets that is mined; in the second how alike the teacher finds
        the classes.
        """
        return self.shown if self.inner is None or self.shown else self.inner.observed()

    def answers(self) -> Answers:
        return {} if self.inner is None else self.inner.answers()

    def pictures(self) -> Pictures:
        return {} if self.inner is None else self.inner.pictures()


def second(setup: Setup, hp: REFILLED.Config) -> Method:
    """The other method of the second phase."""
    key, usual = "hp.refilled.then", REFILLED.Config()
    method, config = known(key, hp.then), settings_of(key, hp.then, hp.then_preset)
    for field in ("ce", "kl", "T", "beta", "head", "centres"):
        if getattr(hp, field) != getattr(usual, field):
            raise UserError(
                f"hp.refilled.{field}={getattr(hp, field)} has no effect with hp.refilled.then={hp.then}, which has weights of"
                " its own; leave it out, or choose hp.refilled.then_preset"
            )
    return method(setup, config)


def distances(e: Tensor) -> Tensor:
    """(B, D) -> (B, B) Euclidean distances of the unit vectors; the gradient of one that is zero is zero."""
    e = F.normalize(e.float(), eps=SHORTEST)
    return torch.cdist(e, e, compute_mode="donot_use_mm_for_euclid_dist")


def semi_hard(d: Tensor, labels: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """(B, B) distances -> the P pairs (a, p) of one class in order, (P, 2), and which images are their negatives, (P, B)."""
    alike = labels[:, None] == labels
    pairs = (alike & ~torch.eye(len(d), dtype=torch.bool, device=d.device)).nonzero()
    a, p = pairs.unbind(1)
    gap = d[a] - d[a, p][:, None]
    return pairs, ~alike[a] & (gap > 0) & (gap <= margin)


def divergence(z_s: Tensor, z_t: Tensor, kept: Tensor) -> Tensor:
    """Sum of KL(softmax(z_t) || softmax(z_s)) over all rows, the softmax over what is kept of the last dimension."""
    log_q, log_p = (F.log_softmax(z.masked_fill(~kept, -FAR), -1) for z in (z_s, z_t))
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def class_sums(e: Tensor, labels: Tensor, k: int) -> Tensor:
    """(B, D), (B,) -> (k, D)."""
    return product(F.one_hot(labels, k).T, e)


def ncm(e: Tensor, labels: Tensor) -> float:
    """Accuracy in percent of the nearest class mean, embeddings (N, D) by their inner products with the classes' centres.

    The centres are of unit norm and come from these very embeddings, as the authors have it.
    """
    centres = F.normalize(class_sums(e, labels, int(labels.max()) + 1))
    return 100 * (product(e, centres.T).argmax(1) == labels).double().mean().item()
