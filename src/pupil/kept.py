"""What is left of a teacher's features where logits and embeddings alone are kept, and which methods can learn from that.

Whatever else of the teacher a loss reads is `Absent`, which can be passed on and not be used.
"""

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor

from pupil.fit import activate
from pupil.methods.base import Method
from pupil.types import Batch, Features, UserError

IMAGES = 8  # of the batch that a method is tried on


class Absent(Tensor):
    """A tensor that nobody kept."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise NotKept("views: the method reads more of the teacher than its logits and embeddings, which are all that is kept")


class NotKept(UserError):
    """An absent tensor was used, or the teacher itself."""


ABSENT: Tensor = torch.empty(0).as_subclass(Absent)


def kept(of: Features, embedding: Tensor, logits: Tensor) -> Features:
    """(B, D) and (B, K) as features of a network like that of `of`."""
    return Features(ABSENT, (ABSENT,) * len(of.maps), (ABSENT,) * len(of.pre), ABSENT, embedding, logits)


def refuse_readers(name: str, method: Method, views: int, image_size: int) -> None:
    """Refuses a method that reads more; found by trying every phase of it on a copy, with random images."""
    if method.two_views:
        raise UserError(
            f"{name} shows the teacher a second view of each image, and views={views} keeps its answers to one; use views=null,"
            " or a method of one view, such as dkd"
        )
    trial = copy.deepcopy(method)
    n = min(IMAGES, len(method.setup.labels))

    def asked(images: Tensor) -> NoReturn:
        raise NotKept

    trial.teacher.features = asked  # type: ignore[method-assign]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        t = kept(method.setup.t, *(torch.randn(n, x.shape[1]) for x in (method.setup.t.embedding, method.setup.t.logits)))
        batch = Batch(torch.randn(n, 3, image_size, image_size), method.setup.labels[:n], torch.arange(n))
        try:
            for phase in trial.phases():
                activate(trial, phase)
                trial(batch, t, phase.loss)
        except NotKept:
            raise UserError(
                f"{name} reads more of the teacher than its logits and embeddings, which are all that views={views} keeps;"
                " use views=null, or a method on these, such as kd, dkd, crd, srrl"
            ) from None
        except Exception:  # what else stands in the way, the training itself says
            return
