"""What grows with the number of images grows in proportion to it, and keeps few bytes of each; figures of ImageNet's size are
in benchmarks/README.md.
"""

import hashlib
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import scale
from torch.utils._python_dispatch import TorchDispatchMode

from pupil.data import Data
from pupil.data.base import Images
from pupil.data.draw import draw
from pupil.data.files import FileWriter, open_split
from pupil.data.report import Seen, duplicates
from pupil.methods import METHODS
from pupil.methods.base import Setup
from pupil.net import probe
from tests import tiny


class Work(TorchDispatchMode):
    """Counts the elements that torch's operations read."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.elements += sum(a.numel() for a in args if isinstance(a, torch.Tensor))
        return func(*args, **(kwargs or {}))


def work(call: Callable[[], Any]) -> int:
    with Work() as counted:
        call()
    return counted.elements


@pytest.mark.parametrize("config", [Data(), Data(per_class=3), Data(folds=3, fold=0)], ids=str)
def test_a_draw_is_as_much_work_for_many_classes_as_for_few(config: Data) -> None:
    elements = []
    for classes in (10, 500):
        content = scale.made_content(scale.Scale(40_000, classes, 20_000), False)
        elements.append(work(lambda content=content, classes=classes: draw(config, content, list(range(classes)))))
    assert elements[1] < 1.5 * elements[0]


def test_negatives_are_drawn_without_a_look_at_all_images() -> None:
    elements = []
    for n in (1_000, 100_000):
        around = tiny.setup()
        s, t = (probe(net, tiny.SIZE) for net in (around.student, around.teacher))
        setup = Setup(around.student, around.teacher, s, t, torch.arange(n) % tiny.CLASSES, 8)
        method: Any = METHODS["crd"](setup, METHODS["crd"].Config(k=16, dim=4))
        elements.append(work(lambda method=method: method.negatives(torch.arange(8) % tiny.CLASSES)))
    assert elements[1] - elements[0] < 2 * 99_000, "the table of classes is read from, not through"


def traced(call: Callable[[], Any]) -> int:
    """Bytes of Python and numpy at the peak."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_search_for_duplicates_keeps_little_of_each_image() -> None:
    n = 50_000
    marks = [hashlib.sha256(str(i).encode()).digest() for i in range(n)]
    marks[17] = marks[40_000]
    seen = {
        "train": Seen(["name"] * n, torch.zeros(n, 2), marks),
        "test": Seen(["name"], torch.zeros(1, 2), [marks[3]]),
    }
    labels = {"train": torch.arange(n), "test": torch.tensor([3])}
    found: dict[str, Any] = {}
    assert traced(lambda: found.update(duplicates(seen, labels))) < 200 * n
    assert found["within"] == {"train": 1, "test": 0}
    assert found["across"] == {"train-test": 1}
    assert (found["groups"], found["of_different_classes"]) == (2, 1)
    assert found["first"] == [["train: name", "test: name"], ["train: name", "train: name"]]


def test_encoded_images_are_written_a_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n, block, writes = 20_000, 500, []
    writer, plain = FileWriter(tmp_path / "x.safetensors", n, 8), FileWriter.write
    monkeypatch.setattr(FileWriter, "write", lambda self, *args: (writes.append(args[0]), plain(self, *args))[1])
    wanted = torch.arange(block) % 4 > 0
    sizes = torch.arange(2 * block).view(block, 2)
    files = [bytes([i % 256]) * (i % 7) for i in range(block)]

    def run() -> None:
        for _ in range(n // block):
            writer.add(Images(torch.empty(0), sizes, [], {}, files), wanted)

    assert traced(run) < 20 * n
    kept = int(wanted.sum()) * (n // block)
    writer.finish(torch.zeros(kept, dtype=torch.int64), torch.arange(kept))
    assert len(writes) == n // block + 1
    split = open_split(tmp_path / "x.safetensors")
    assert split.pixels.shape[0] == kept
    assert split.pixels.files([5, 400, kept - 1]) == [files[i] for i in (7, 34, 499)]  # type: ignore[union-attr]
    assert split.pixels.sizes[400].tolist() == sizes[34].tolist()  # type: ignore[union-attr]


@pytest.mark.slow
def test_the_benchmark_measures_every_piece(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scale.main(["--images", "20000", "--classes", "20", "--test", "500", "--json", str(tmp_path / "scale.json")])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ") and "seconds" not in line]
    assert {row.split(" | ")[0][2:] for row in rows} == set(scale.PARTS)
    assert (tmp_path / "scale.json").read_text().count('"piece"') == len(rows) > 25
