"""What a frozen teacher says of every training image in each of its views, on disk: computed once, then read in its place.

A folder below .work/cache belongs to one teacher, one data set and one way of computing: its name is a hash of facts.json in
it.  Each view is a file: logits (N, K), embeddings (N, D), float16, then the SHA-256 of facts, view and numbers.  It is there
as a whole or not at all, so that a filling that was broken off goes on with the view it was at, and views can be added.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pupil.config import ROOT
from pupil.data.augment import view_of
from pupil.data.batches import Batches
from pupil.data.files import mapped
from pupil.data.memory import free_memory
from pupil.kept import kept
from pupil.methods.base import Method
from pupil.speed import Speed, quick
from pupil.types import Batch, Features, UserError

FORMAT = 1
CODE = ("data", "models", "fold.py", "net.py", "speed.py")  # of this package: what decides images and answers
PACKAGES = ("torch", "torchvision", "timm", "pillow", "nvidia-dali-cuda120")
Answer = Callable[[Tensor], Features]
Halt = Callable[[], None]


def go_on() -> None:
    pass


class Size(NamedTuple):
    """Of one view."""

    images: int
    classes: int
    width: int  # of the embedding

    @property
    def numbers(self) -> int:  # bytes
        return 2 * self.images * (self.classes + self.width)

    @property
    def file(self) -> int:  # bytes
        return self.numbers + hashlib.sha256().digest_size


class Cache:
    """Of one teacher; a view is a number from 1."""

    def __init__(self, root: Path, facts: Mapping[str, Any], size: Size) -> None:
        """`facts`: all that decides the numbers, plain values."""
        self.text = json.dumps({"format": FORMAT, **facts, "size": size._asdict()}, indent=1, sort_keys=True) + "\n"
        self.folder, self.size = root / hashlib.sha256(self.text.encode()).hexdigest()[:16], size

    def path(self, view: int) -> Path:
        return self.folder / f"view{view}.float16"

    def missing(self, views: int) -> list[int]:
        return [view for view in range(1, views + 1) if not self.path(view).exists()]

    def fill(self, views: int, train: Batches, answer: Answer, halt: Halt = go_on) -> None:
        """Adds the views that are missing; waits while another process is at it."""
        if not self.missing(views):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with alone(self.folder / "lock", halt):
            todo = self.missing(views)  # another process may have been at it
            if todo:
                print(f"the teacher's answers: {self.need(len(todo))}, in {self.folder}", flush=True)
            (self.folder / "facts.json").write_text(self.text)
            for view in todo:
                start = time.perf_counter()
                new = self.path(view).with_suffix(".new")
                self.write(new, view, train, answer, halt)
                new.replace(self.path(view))
                print(f"view {view} of {views} is kept ({time.perf_counter() - start:.1f} s)", flush=True)

    def need(self, views: int) -> str:
        """In words; refused if the disk has no room for it."""
        need, free = views * self.size.file, shutil.disk_usage(self.folder).free
        each = f"{self.size.images:,} images x ({self.size.classes} logits + {self.size.width} of the embedding) x 2 bytes"
        words = f"{views} view{'s' * (views > 1)} of {each}, {need / 1e6:,.1f} MB"
        if need > 0.95 * free:
            raise UserError(
                f"views: {words}, and the disk of {self.folder} has {free / 1e6:,.1f} MB left; make room, or lower views"
            )
        return words

    @torch.no_grad()
    def write(self, path: Path, view: int, train: Batches, answer: Answer, halt: Halt) -> None:
        """The images in the split's own order, in the training's batch size: the same numbers whoever asks first."""
        n, classes, width = self.size
        plan = torch.arange(n).split(train.batch_size)
        with open(path, "wb+") as file:
            for ids, batch in zip(plan, train.shown(view, plan), strict=True):
                halt()
                said = answer(batch.images)
                for part, start, each in ((said.logits, 0, classes), (said.embedding, n * classes, width)):
                    numbers = part.half().cpu()
                    if not numbers.isfinite().all():
                        most = part.abs().max().item()
                        raise UserError(f"views: float16 cannot hold what the teacher says (up to {most:.3g}); use views=null")
                    file.seek(2 * (start + int(ids[0]) * each))
                    file.write(numbers.numpy().tobytes())
            file.seek(0)
            digest = self.digest(view, file)
            file.seek(self.size.numbers)
            file.write(digest)
            file.flush()
            os.fsync(file.fileno())

    def digest(self, view: int, file: Any) -> bytes:
        found, left = hashlib.sha256(f"{self.text}{view}\n".encode()), self.size.numbers
        while left and (block := file.read(min(left, 1 << 24))):
            found.update(block)
            left -= len(block)
        return found.digest()

    def open(self, view: int) -> tuple[Tensor, Tensor]:
        """Logits (N, K) and embeddings (N, D), float16, on disk; refused where they are not what was written."""
        path, (n, classes, width) = self.path(view), self.size
        with open(path, "rb") as file:
            if path.stat().st_size != self.size.file or self.digest(view, file) != file.read():
                raise UserError(
                    f"{path} is damaged or of something else: its SHA-256 is not that at its end; delete it, it is filled again"
                )
        return mapped(path, 0, "<f2", (n, classes)), mapped(path, 2 * n * classes, "<f2", (n, width))


class Kept:
    """Answers in the teacher's place: of the batch's samples, in the view of its epoch."""

    def __init__(self, cache: Cache, views: int, like: Features, device: torch.device) -> None:
        """`like`: the teacher's features of any images.  On a GPU half of its free memory may hold the numbers."""
        self.views, self.like, self.device = views, like, device
        there = device if views * cache.size.numbers < free_memory(device) / 2 else torch.device("cpu")
        self.said = [tuple(part.to(there) for part in cache.open(view)) for view in range(1, views + 1)]

    def __call__(self, batch: Batch) -> Features:
        logits, embedding = self.said[view_of(batch.epoch, self.views) - 1]
        ids = batch.ids.to(logits.device)
        return kept(self.like, *(part[ids].to(self.device).float() for part in (embedding, logits)))


def answering(
    root: Path,
    method: Method,
    taught: Mapping[str, Any],
    data: str,
    train: Batches,
    views: int,
    speed: Speed,
    halt: Halt = go_on,
) -> Kept:
    """What answers for the method's teacher in a training; what is missing is computed now.

    `taught`, `data`: see `facts`.  `halt` is called between batches, and while another process is waited for; it may raise.
    """
    like = method.setup.t
    size = Size(len(train.labels), like.logits.shape[1], like.embedding.shape[1])
    cache = Cache(root, facts(taught, data, train, speed), size)
    if cache.missing(views):
        with quick(method, method.teacher, speed):
            cache.fill(views, train, method.teacher.features, halt)
    return Kept(cache, views, like, train.device)


def facts(taught: Mapping[str, Any], data: str, train: Batches, speed: Speed) -> dict[str, Any]:
    """What decides the numbers.  `taught`: the teacher's network, the hash of its weights, and the outputs that it is cut to;
    `data`: the digest of the prepared data.
    """
    cuda = train.device.type == "cuda"
    return {
        "teacher": taught,
        "data": data,
        "augment": train.augment._asdict(),
        "decoded by": type(train).__name__ if train.augment.crop == "resized" else None,
        "batch size": train.batch_size,
        "computed in": [speed.bf16, speed.channels_last, bool(speed.compile)],
        "device": torch.cuda.get_device_name(train.device) if cuda else torch.backends.cpu.get_cpu_capability(),
        "packages": {name: family(name) for name in PACKAGES},
        "code": code(),
    }


def family(package: str) -> str | None:
    """Its version, without what only mends it."""
    try:
        return ".".join(version(package).split(".")[:2])
    except PackageNotFoundError:
        return None


def code() -> str:
    """Of this package what decides images and answers, and the networks of one's own."""
    here, digest = Path(__file__).parent, hashlib.sha256()
    for place in (*(here / name for name in CODE), ROOT / "networks"):
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@contextmanager
def alone(lock: Path, halt: Halt) -> Iterator[None]:
    """One process at a time; the others wait, and say for whom.  The lock goes with the process that holds it."""
    with open(lock, "a+") as file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                if not told:
                    print(f"{lock.parent} is being filled by {file.read().strip() or 'another process'}: waiting", flush=True)
                told = True
                time.sleep(0.2)
                halt()
        file.truncate(0)
        file.write(f"process {os.getpid()}\n")
        file.flush()
        yield
