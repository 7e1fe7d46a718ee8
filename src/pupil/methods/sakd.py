"""SAKD: for every image and every spot a small policy decides whether to distil, by what routing through the teacher gives.

Paper: Song, Chen, Ye & Song, Spot-adaptive Knowledge Distillation, IEEE TIP 2022, doi 10.1109/TIP.2022.3170728.
Loss: ce * CE + beta * [ the wrapped method's (`of`) kl * |S_z|/B KL(T) of the rows S_z + its beta * sum over its spots k
of |S_k|/B loss_k of the rows S_k ] + q.  S_k are the images whose gate g_k is 1; an empty one gives 0.  The gates are
straight-through Gumbel samples at `tau` of a linear layer on the detached embeddings of teacher and student.
q = f CE(z_G) + max(0, B/2 - sum g_z), with f = gamma where CE(z_G) > CE(z_s) and 1/gamma where it is less.  z_G are the
logits of both networks walked at once, the student in eval mode: at spot k x_t = (1 - g) H_k(h_s) + g h_t and
x_s = (1 - g) h_s + g A_k(h_t) go on, and at the end z_G = (1 - g_z) z_s + g_z z_t.
Trained: the student and what the wrapped method trains; by q alone the agent: policy and adapters H_k, A_k (convolution,
batch norm, ReLU; linear for embeddings), at half the learning rate and with a weight decay of its own.
Deployed: the student.  val/routed/top1 is the accuracy of z_G; pictures show the share of images distilled at every spot
and epoch, and the training images that the policy refused most often.
mode: reverse distils where the policy would not; random tosses a coin (no agent, gamma * CE); both trains a copy of the
teacher too (gamma * (CE(z_s) + CE(z_t)), no detaching, q = gamma CE(z_G), no lean; the agent's learning rate is a
hundredth until a schedule by steps first drops); all distils everything: the wrapped method with its weights.
Defaults: the authors' for CIFAR-100, with AT wrapped.  The wrapped method comes with its preset spot-adaptive (kl 1).
Presets: their pairs, `homogeneous` or not; tiny-...: theirs of Tiny-ImageNet (gamma 2).  They train with lr 0.05
(MobileNetV2_1_0, ShuffleV1: 0.01) for 240 epochs in steps at 150, 180 and 210, in batches of 64.
Deviations: one backward pass does both of their updates, because no gradient of q reaches the student; the lean is added
without gradients (theirs fails on today's torch); a subset of one image gives 0 in CC and RKD (theirs: no number).
As theirs, what is compared on the teacher's side is detached, so CC's W_t stays as it begins (mode both: not).  KDSVD
compares a stage with the one before on the rows of the later one.  Where networks have different numbers of stages,
a spot counted from the deep end is each network's own.  As theirs, FT without a chosen image takes the whole batch
(`empty`), and one draw serves the logits and the last spot in mode random with several spots.
Cost: one more forward pass of each network, and one wait of the host for the sizes of the subsets, every step.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pupil.methods.base import Answers, Chart, Group, Method, Phase, Pictures, Setup, Sheet
from pupil.methods.functions import kl
from pupil.methods.midway import classifiers
from pupil.methods.routing import Crossing, Policy, frozen
from pupil.methods.wrapping import Wrapper, weighed, wrap
from pupil.types import Batch, Features, Term, Terms, UserError

MODES = ("adaptive", "reverse", "random", "both", "all")
SHOWN = 32  # pictures
ALIKE = (("resnet32x4", "resnet8x4"), ("resnet56", "resnet20"), ("vgg13", "vgg8"), ("wrn_40_2", "wrn_16_2"))


class Agent(nn.Module):
    """What decides, and what its decisions are tried on."""

    def __init__(self, policy: Policy, crossing: Crossing) -> None:
        super().__init__()
        self.policy, self.crossing = policy, crossing


class SAKD(Method):
    paper = "Song, Chen, Ye & Song, Spot-adaptive Knowledge Distillation, IEEE TIP 2022, doi 10.1109/TIP.2022.3170728"
    remembers = ("tally",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "spot-adaptive": {},
        **{f"{t}-{s}": {"homogeneous": True} for t, s in [("resnet110", "resnet32"), *ALIKE]},
        **{f"tiny-{t}-{s}": {"homogeneous": True, "gamma": 2.0} for t, s in [("resnet110", "resnet20"), *ALIKE[1:]]},
        "tiny-vgg13-MobileNetV2_1_0": {"gamma": 2.0},
    }

    @dataclass(frozen=True)
    class Config(Wrapper):
        of: str = "at"  # the wrapped method, which must compare the networks spot by spot
        of_preset: str = ""  # of the wrapped method; "": spot-adaptive, if it has that
        T: float = 4.0  # temperature of the wrapped method's KL
        mode: str = "adaptive"  # adaptive, reverse, random, both or all
        homogeneous: bool = False  # networks of one kind: begins by distilling nearly everything (not in mode both)
        gamma: float = 0.0  # of the routed cross-entropy; 0: the authors' for CIFAR, 2 for at, rkd and vid, 1 for others
        tau: float = 5.0  # temperature of the gates' gradient
        agent_lr: float = 0.5  # of policy and adapters, times the student's
        agent_weight_decay: float = 1e-3  # of policy and adapters
        deep_adapters: bool = False  # whether adapters of maps have a second convolution
        empty: str = "authors"  # where no image is chosen: zero, or authors (zero; FT: the whole batch)
        evaluate: str = "likeliest"  # gates of the routed network where it is evaluated: likeliest, or sampled as theirs
        mid: str = ""  # adds classifiers of the teacher's answer on the student's maps: words SPOT:T, such as 1:4 2:2
        mid_weight: float = 1.0  # of these
        clusters: str = ""  # adds classifiers of clusters of classes: words SPOT:CLASSES/CLASSES, such as 1:0,1,2/3,4
        clusters_weight: float = 1.0  # of these

    refused: Tensor  # (N, spots + 1) how often the policy would not distil each training image there

    def __init__(self, setup: Setup, hp: Config) -> None:
        super().__init__(setup, hp)
        check(hp)
        twin = copy.deepcopy(setup.teacher).requires_grad_() if hp.mode == "both" else None
        around = setup if twin is None else replace(setup, teacher=twin)
        self.inner = wrap("sakd", around, hp, "spot-adaptive", several_phases=True)
        self.twin = twin
        by_spots = type(self.inner).knowledge is Method.knowledge and type(self.inner).loss is Method.loss
        if not (self.inner.spots and by_spots):
            raise UserError(
                f"hp.sakd.of: sakd wraps a method that compares spot by spot (at, sp, vid, crd, ...), got {hp.of!r}"
            )
        self.inner.hp = replace(self.inner.hp, T=hp.T)
        self.gamma = hp.gamma or (2.0 if hp.of in ("at", "rkd", "vid") else 1.0)
        names = [f"spot_{i}" for i in range(len(setup.s.taps) - 1)] + ["embedding"]
        self.places = [*(names[spot] for spot in self.inner.spots), "logits"]
        self.agent, gates = None, len(self.places)
        if hp.mode not in ("random", "all"):
            width = setup.s.embedding.shape[1] + setup.t.embedding.shape[1]
            policy = Policy(width, gates, hp.tau, hp.homogeneous and hp.mode != "both")
            self.agent = Agent(policy, Crossing("sakd", setup, self.inner.spots, hp.deep_adapters))
        self.extras = classifiers(setup, hp.mid, hp.clusters)
        self.tally: dict[int, list[int]] = {}  # epoch -> its images, and how many of them were distilled at each gate
        self.register_buffer("refused", torch.zeros(len(setup.labels), gates, dtype=torch.int32), persistent=False)

    def phases(self) -> list[Phase]:
        *before, last = self.inner.phases()
        groups = [*last.train, Group(self.extras), *([] if self.twin is None else [Group(self.twin)])]
        if self.agent is not None:
            early = 0.01 if self.hp.mode == "both" else 1.0
            groups.append(Group(self.agent, self.hp.agent_lr, self.hp.agent_weight_decay, early))
        return [*before, last._replace(loss=self.loss, train=groups)]

    def loss(self, s: Features, t: Features, batch: Batch) -> Terms:
        t = t if self.twin is None else self.twin.features(batch.images)
        if self.hp.mode == "all":
            return weighed(self.inner.loss(s, t, batch), self.hp) | self.further(s, t, batch)
        return self.routed_by(self.gates(s, t), s, t, batch)

    def gates(self, s: Features, t: Features) -> Tensor:
        """(B, spots + 1): 1 where to distil; the last are the logits'."""
        if self.agent is not None:
            return self.agent.policy.sampled(s.embedding, t.embedding)
        draws = torch.randn(len(s.logits), len(self.inner.spots) + 1, 2, device=s.logits.device)
        gates = (draws.softmax(2)[..., 0] > 0.5).float()
        return torch.cat([gates[:, :-1], gates[:, -2:-1]], 1) if len(self.inner.spots) > 1 else gates

    def routed_by(self, gates: Tensor, s: Features, t: Features, batch: Batch) -> Terms:
        """The terms that follow from gates (B, spots + 1)."""
        hp, own, both = self.hp, self.inner.hp, self.twin is not None
        *sets, rows = self.chosen(gates.detach() > 0.5, batch)
        ce = F.cross_entropy(s.logits.float(), batch.labels)
        terms: Terms = {}
        if weight := hp.ce * own.ce * (1.0 if hp.mode in ("adaptive", "reverse") else self.gamma):
            terms["ce"] = Term(ce + F.cross_entropy(t.logits.float(), batch.labels) if both else ce, weight)
        if weight := hp.beta * own.kl:
            share = len(rows) / len(gates)
            found = kl(s.logits[rows], t.logits[rows], own.T) if len(rows) else ce.new_zeros(())
            terms["kl"] = Term(share * found, weight)
        if weight := hp.beta * own.beta:
            terms["knowledge"] = Term(self.of_some(sets, s, t, batch), weight)
        if self.agent is not None:
            terms["agent"] = Term(self.judged(gates, ce.detach(), t, batch), 1.0)
        return terms | self.further(s, t, batch)

    def chosen(self, distils: Tensor, batch: Batch) -> list[Tensor]:
        """(B, spots + 1) decisions of the policy -> for each gate the rows to distil, in their order."""
        if self.agent is not None:
            self.refused.index_add_(0, batch.ids, (~distils).int())
        if self.hp.mode == "reverse":
            distils = ~distils
        order = distils.int().argsort(dim=0, descending=True, stable=True)
        sizes = distils.sum(0).tolist()  # the one wait for the device
        counts = self.tally.setdefault(batch.epoch, [0] * (1 + len(sizes)))
        self.tally[batch.epoch] = [a + b for a, b in zip(counts, [len(distils), *sizes], strict=True)]
        return [order[:n, k] for k, n in enumerate(sizes)]

    def of_some(self, sets: list[Tensor], s: Features, t: Features, batch: Batch) -> Tensor:
        """The wrapped method's own loss where each spot sees the rows chosen for it, by their share of the batch."""
        losses = [s.logits.new_zeros((), dtype=torch.float32)]
        learns = self.twin is not None
        for i, ((f_s, f_t), rows) in enumerate(zip(self.inner.compared(s, t), sets, strict=True)):
            if len(rows):
                pair = picked(f_s, rows), picked(f_t, rows, learns)
                losses.append(len(rows) / len(batch.labels) * self.inner.match(i, *pair, some_of(batch, rows)))
            elif self.hp.of == "ft" and self.hp.empty == "authors":
                losses.append(self.inner.match(i, f_s, picked(f_t, slice(None), learns), batch))
        return torch.stack(losses).sum()

    def judged(self, gates: Tensor, ce: Tensor, t: Features, batch: Batch) -> Tensor:
        """What the routing costs: its gradient reaches the gates and the adapters alone."""
        assert self.agent is not None
        teacher, crossing = self.teacher if self.twin is None else self.twin, self.agent.crossing
        known = t.taps[crossing.spots[1][0]] if self.twin is None else None  # of a network in eval mode, as here
        with frozen(self.student, teacher):
            z = crossing(self.student, teacher, batch.images, gates, known)
        q = F.cross_entropy(z.float(), batch.labels)
        if self.twin is not None:
            return self.gamma * q
        factor = torch.where(q > ce, self.gamma, torch.where(q < ce, 1 / self.gamma, 1.0)).detach()
        return factor * q + (len(gates) / 2 - gates[:, -1].sum()).clamp(min=0)

    def further(self, s: Features, t: Features, batch: Batch) -> Terms:
        """The classifiers on maps."""
        weights = {"mid": self.hp.mid_weight, "clusters": self.hp.clusters_weight}
        return {name: Term(more(s.taps, t.logits, batch.labels), weights[name]) for name, more in self.extras.items()}

    def answers(self) -> Answers:
        routed = {} if self.agent is None else {"routed": self.routed}
        return routed | ({} if self.twin is None else {"trained_teacher": self.twin})

    def routed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, K): what both networks answer together."""
        assert self.agent is not None
        teacher, policy = self.teacher if self.twin is None else self.twin, self.agent.policy
        decide = policy.sampled if self.hp.evaluate == "sampled" else policy.likeliest
        gates = decide(self.student.features(images).embedding, teacher.features(images).embedding)
        return self.agent.crossing(self.student, teacher, images, gates)

    def observed(self) -> dict[str, Tensor]:
        """The shares of the last epoch's images that were distilled, at each place."""
        last = self.shares()[:, -1] if self.tally else ()
        return self.inner.observed() | {f"distilled_{place}": share for place, share in zip(self.places, last, strict=False)}

    def shares(self) -> Tensor:  # (places, epochs)
        return torch.tensor([[n / images for n in sizes] for images, *sizes in self.tally.values()]).T

    def pictures(self) -> Pictures:
        if not self.tally:
            return {}
        found: dict[str, Sheet | Chart] = {
            "distilled_share": Chart("share of the images that is distilled", self.shares(), self.places, "epoch", (0, 1))
        }
        times, visits = self.refused.sum(1).cpu(), len(self.tally) * len(self.places)
        ids = times.argsort(descending=True, stable=True)[:SHOWN]
        if len(ids := ids[times[ids] > 0]):
            title = "training images that the policy refused to distil most often; share of places and epochs"
            found["refused_by_policy"] = Sheet(title, ids, [f"{100 * n / visits:.0f} %" for n in times[ids].tolist()])
        return found


def check(hp: SAKD.Config) -> None:
    for name, value, known in (
        ("mode", hp.mode, MODES),
        ("empty", hp.empty, ("authors", "zero")),
        ("evaluate", hp.evaluate, ("likeliest", "sampled")),
    ):
        if value not in known:
            raise UserError(f"sakd: hp.sakd.{name} must be one of {', '.join(known)}, got {value!r}")
    if min(hp.tau, hp.agent_lr) <= 0 or min(hp.gamma, hp.agent_weight_decay) < 0:
        given = f"{hp.tau}, {hp.agent_lr}, {hp.gamma} and {hp.agent_weight_decay}"
        raise UserError(f"sakd: tau and agent_lr must be greater than 0, gamma and agent_weight_decay 0 or more, got {given}")


def some_of(batch: Batch, rows: Tensor) -> Batch:
    strong = None if batch.strong is None else batch.strong[rows]
    return Batch(batch.images[rows], batch.labels[rows], batch.ids[rows], batch.epoch, strong)


def picked(x: Any, rows: Tensor | slice, learns: bool = True) -> Any:
    """Rows of a tensor, or of each of several; detached from what does not learn."""
    if not isinstance(x, Tensor):
        return tuple(picked(part, rows, learns) for part in x)
    return x[rows] if learns else x[rows].detach()
