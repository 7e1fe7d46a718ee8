"""What the pieces that hold something of every image take at ImageNet's size, in time and memory; prints a Markdown table.

python -m benchmarks.scale [--images 1281167] [--classes 1000] [--test 50000] [--only draw,crd] [--json scale.json]

Labels, names, sizes and logits are made; images have 8 x 8 pixels (or are JPEGs of that), so that decoding and training
are left out: what remains is the part that grows with the number of images.  Processor seconds are those of all threads;
memory is the growth of the process at its peak.
"""

import argparse
import hashlib
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor

from benchmarks.step import machine
from pupil import figures, measures
from pupil.arrays import save_arrays
from pupil.data import Data, load, prepare
from pupil.data.augment import VIEW, Augment, moves, order
from pupil.data.base import Content, Images, Pool, Source, Tick
from pupil.data.draw import draw
from pupil.data.folder import Split, content_of
from pupil.data.resident import Resident, Streamed
from pupil.data.resized import cuts
from pupil.data.sources import SOURCES
from pupil.data.tree import as_tree
from pupil.methods import METHODS
from pupil.methods.base import Setup
from pupil.methods.crd import CRD
from pupil.models import build
from pupil.net import probe

SIDE = 8  # pixels


class Scale(NamedTuple):
    images: int = 1_281_167
    classes: int = 1000
    test: int = 50_000


Piece = tuple[str, Callable[[], Any]]


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in Scale._field_defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}, with commas between")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(args)
    scale, rows = Scale(given.images, given.classes, given.test), []
    print(f"{machine(torch.device('cpu'))}, {torch.get_num_threads()} threads")
    print(f"{scale.images:,} training images, {scale.classes:,} classes, {scale.test:,} test images\n")
    print("| part | piece | seconds | processor seconds | peak MiB |\n|---|---|---|---|---|", flush=True)
    for part in given.only.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            for name, call in PARTS[part](scale, Path(scratch)):
                row = measured(call)
                rows.append({"part": part, "piece": name, **row._asdict()})
                print(f"| {part} | {name} | {row.seconds:.2f} | {row.processor:.2f} | {row.peak_mib:,.0f} |", flush=True)
    if given.json:
        facts = {"machine": machine(torch.device("cpu")), "threads": torch.get_num_threads(), **scale._asdict(), "rows": rows}
        given.json.write_text(json.dumps(facts, indent=1) + "\n")


class Measured(NamedTuple):
    seconds: float
    processor: float  # seconds of all threads
    peak_mib: float  # that the process grew by (Linux)


def measured(call: Callable[[], Any]) -> Measured:
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, start, work = status("VmRSS"), time.perf_counter(), time.process_time()
    call()
    return Measured(time.perf_counter() - start, time.process_time() - work, max(0.0, status("VmHWM") - before))


def status(key: str) -> float:
    """MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def some_labels(n: int, classes: int) -> Tensor:
    return torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(0))


def listing(scale: Scale, scratch: Path) -> Iterator[Piece]:
    """A tree of class folders, and its pools."""
    names = [f"n{k:08d}" for k in range(scale.classes)]
    counts = {"train": scale.images, "val": scale.test}
    entries = [
        (f"{split}/{names[i % scale.classes]}/ILSVRC2012_{split}_{i:08d}.JPEG", 110_000)
        for split, n in counts.items()
        for i in range(n)
    ]
    made: dict[str, Any] = {}
    yield "names of the files", lambda: made.update(tree=as_tree("the made folder", scratch, entries))
    splits = {"train": Split(made["tree"], "train/"), "test": Split(made["tree"], "val/")}
    yield "classes and labels", lambda: made.update(content=content_of(splits, Data(name="imagenet", path=".")))
    assert len(made["content"].classes) == scale.classes


def drawing(scale: Scale, scratch: Path) -> Iterator[Piece]:
    """Stratified draws."""
    content = made_content(scale, False)
    chosen = list(range(scale.classes))
    yield "10 % for validation", lambda: draw(Data(), content, chosen)
    yield "13 images per class", lambda: draw(Data(per_class=13), content, chosen)
    yield "one of 5 folds", lambda: draw(Data(folds=5, fold=0), content, chosen)


def preparing(scale: Scale, scratch: Path) -> Iterator[Piece]:
    """The prepare stage, and the opening of what it left."""
    for crop in ("pad", "resized"):
        row = Source("made", None, None, Augment(4, True), lambda config: made_content(scale, config.crop == "resized"))
        config, out = Data(name="made", image_size=SIDE, crop=crop), scratch / crop

        def run(config: Data = config, out: Path = out, row: Source = row) -> None:
            with patch.dict(SOURCES, made=row):
                prepare(config, out)

        yield f"prepare, {crop}", run
        yield f"load, {crop}", lambda out=out: load(out)
        data = load(out)
        assert sum(len(labels) for _, labels in data.splits.values()) == scale.images + scale.test


def made_content(scale: Scale, files: bool) -> Content:
    written = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE)).save(written, "JPEG")
    jpeg = written.getvalue()

    def read(first: int) -> Callable[[Tensor, Tick], Images]:
        def images(ids: Tensor, tick: Tick) -> Images:
            tick(len(ids))
            marks = [hashlib.sha256((first + i).to_bytes(8, "little")).digest() for i in ids.tolist()]
            pixels = (ids[:, None, None, None] % 256).to(torch.uint8).expand(-1, 3, SIDE, SIDE)
            sizes = torch.stack([300 + ids % 200, 300 + ids % 100], 1)
            return Images(pixels, sizes, marks, {}, [jpeg] * len(ids) if files else ())

        return images

    pools = [
        Pool(some_labels(n, scale.classes), read(first), [f"{n}/{i:08d}.JPEG" for i in range(n)])
        for n, first in ((scale.images, 0), (scale.test, scale.images))
    ]
    return Content(tuple(f"n{k:08d}" for k in range(scale.classes)), train=pools[0], test=pools[1], fingerprint="made")


def drawn_numbers(scale: Scale, scratch: Path) -> Iterator[Piece]:
    """What is drawn for an epoch."""
    ids, sizes = torch.arange(scale.images), torch.randint(200, 600, (scale.images, 2))
    yield "order of an epoch", lambda: order(0, 1, scale.images)
    yield "crops and flips of an epoch", lambda: moves(Augment(4, True), 0, 1, ids, VIEW)
    yield "resized crops of a batch of 256", lambda: cuts(sizes[:256], Augment(0, True, "resized"), 0, 1, ids[:256])
    pixels = torch.zeros(scale.images, 3, SIDE, SIDE, dtype=torch.uint8)
    given = some_labels(scale.images, scale.classes), (0.5,) * 3, (0.25,) * 3, 256, torch.device("cpu"), 0, Augment(1, True)
    loader = Resident(pixels, *given)
    yield "an epoch of the resident loader", lambda: sum(len(batch.labels) for batch in loader.epoch(1))
    path = scratch / "pixels"
    pixels.numpy().tofile(path)
    streamed = Streamed(pixels_of(path, pixels), *given)
    yield "an epoch of the streamed loader", lambda: sum(len(batch.labels) for batch in streamed.epoch(1))


def pixels_of(path: Path, pixels: Tensor) -> Any:
    from pupil.data.files import Pixels

    return Pixels(path, 0, tuple(pixels.shape))


def memory_banks(scale: Scale, scratch: Path) -> Iterator[Piece]:
    """CRD: both banks, and a step of its loss on embeddings of 64 images."""
    labels = some_labels(scale.images, scale.classes)
    student, teacher = build("resnet8", scale.classes), build("resnet14", scale.classes)
    setup = Setup(student, teacher, probe(student, 32), probe(teacher, 32), labels, 64)
    for bank in ("float32", "float16"):
        made: dict[str, Any] = {}
        yield f"{bank} banks", lambda made=made, bank=bank: made.update(method=METHODS["crd"](setup, CRD.Config(bank=bank)))
        method, ids = made["method"], torch.randint(0, scale.images, (64,))
        yield "drawing the negatives of 64 images", lambda method=method, ids=ids: method.negatives(labels[ids])
        rows = torch.cat([ids[:, None], method.negatives(labels[ids])], 1)
        e_s, e_t = (torch.randn(64, probe(net, 32).embedding.shape[1], requires_grad=True) for net in (student, teacher))

        def step(method: Any = method, e_s: Tensor = e_s, e_t: Tensor = e_t, rows: Tensor = rows) -> None:
            method.contrast(e_s, e_t.detach(), rows).backward()

        step()  # the banks' pages are touched for the first time
        yield f"loss and gradient, {bank}", step


def answers(scale: Scale, scratch: Path) -> Iterator[Piece]:
    """What is kept and measured of the answers to the test images."""
    labels = some_labels(scale.test, scale.classes)
    logits = torch.randn(scale.test, scale.classes, generator=torch.Generator().manual_seed(1))
    names = [f"n{k:08d}" for k in range(scale.classes)]
    saved = {"labels": labels, "deployed": logits, "last": logits.clone(), "best_by_val": logits.clone()}
    yield "writing predictions", lambda: save_arrays(scratch / "predictions.safetensors", saved)
    yield "accuracy, NLL, calibration", lambda: measures.quality(logits, labels)
    yield "accuracy of each class", lambda: measures.per_class(logits, labels)
    yield "agreement", lambda: measures.agreement(logits, saved["last"])
    table = measures.confusion(logits, labels)
    yield "confusion matrix, drawn", lambda: figures.confusion(table, names, scratch / "confusion.png")
    images = torch.zeros(scale.test, 3, SIDE, SIDE, dtype=torch.uint8)
    yield "mistakes, drawn", lambda: figures.mistakes(logits, labels, images, names, scratch / "mistakes.png")


PARTS: dict[str, Callable[[Scale, Path], Iterator[Piece]]] = {
    "listing": listing,
    "draw": drawing,
    "prepare": preparing,
    "epoch": drawn_numbers,
    "crd": memory_banks,
    "answers": answers,
}

if __name__ == "__main__":
    main()
