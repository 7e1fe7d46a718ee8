"""SGD, its schedule, and what a phase changes of them."""

from dataclasses import dataclass
from functools import partial

import torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LambdaLR, LRScheduler, MultiStepLR

from pupil.dot import DOT
from pupil.methods.base import Phase


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
        on_gpu = all(p.is_cuda for group in groups for p in group["params"])
        sgd = torch.optim.SGD(groups, lr, optim.momentum, nesterov=optim.nesterov, fused=on_gpu or None)  # slower on CPUs
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
