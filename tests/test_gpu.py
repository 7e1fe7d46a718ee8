"""What only a CUDA device can show."""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from pupil.data import Data, load, prepare
from pupil.data.memory import KINDS
from pupil.data.resident import Augment, Resident
from pupil.fit import Watch, fit, teacher_features
from pupil.lanes import Graphs, Streams, Turns
from pupil.methods import METHODS
from pupil.methods.base import Group, Phase, Setup
from pupil.models import build
from pupil.net import probe
from pupil.optim import Optim, make_optimizer
from pupil.scoring import score
from pupil.speed import Speed, quick
from pupil.training import Training
from tests import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def train_on(device: torch.device, name: str) -> tuple[dict[str, list[float]], float]:
    """Terms per epoch and training accuracy of one method on made images with a visible rule."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 4
    images = torch.randint(0, 60, (256, 3, 32, 32), generator=g, dtype=torch.uint8) + (labels * 48).view(-1, 1, 1, 1).to(
        torch.uint8
    )
    mean, std = (0.4, 0.4, 0.4), (0.25, 0.25, 0.25)
    train = Resident(images, labels, mean, std, 64, device, 0, Augment(2, True), two_views=True)
    val = Resident(images, labels, mean, std, 256, device)
    torch.manual_seed(1)
    teacher = build("wrn_16_1", 4).eval().requires_grad_(False)
    student = build("resnet8", 4)
    hp = METHODS[name].Config(**tiny.QUICK.get(name, {}))
    method = METHODS[name](Setup(student, teacher, probe(student, 32), probe(teacher, 32), labels, 64), hp)
    method.to(device)
    teacher.to(device)
    history: dict[str, list[float]] = {}

    def log(values: Mapping[str, float], epoch: int) -> None:
        for key, value in values.items():
            history.setdefault(key, []).append(value)

    optim = Optim(epochs=3, batch_size=64, lr=0.02, schedule="cosine")
    tiny.fit(method, teacher, train, val, optim, log, lambda batches, *_: iter(batches))
    return history, score(method.student, val)["top1"]


@pytest.mark.parametrize("name", METHODS)
def test_training_on_the_gpu_begins_as_on_the_cpu_and_keeps_the_teacher_there(name: str) -> None:
    cpu, _ = train_on(torch.device("cpu"), name)
    gpu, _ = train_on(torch.device("cuda"), name)
    assert cpu.keys() == gpu.keys()
    first = next(key for key in cpu if key.endswith("/loss"))
    if name not in ("crd", "crdth", "sakd"):  # negatives and gates come from the device's own random numbers
        assert gpu[first][0] == pytest.approx(cpu[first][0], rel=2e-2)


def test_resident_batches_are_the_same_on_both_devices() -> None:
    images = torch.randint(0, 256, (50, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(50) % 5
    rest = ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 16)
    here = Resident(images, labels, *rest, torch.device("cpu"), 3, Augment(2, True))
    there = Resident(images, labels, *rest, torch.device("cuda"), 3, Augment(2, True))
    for a, b in zip(here.epoch(4), there.epoch(4), strict=True):
        assert torch.equal(a.ids, b.ids.cpu())
        assert torch.allclose(a.images, b.images.cpu(), atol=1e-6)


@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_dali_on_the_gpu_shows_what_the_cpu_shows(tmp_path: Path, crop: str) -> None:
    pytest.importorskip("nvidia.dali")
    g = torch.Generator().manual_seed(0)
    for split, name, i in product(("train", "test"), "ab", range(20)):
        path = tmp_path / "in" / split / name / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = torch.randint(0, 256, (6, 7, 3), generator=g, dtype=torch.uint8).numpy()
        Image.fromarray(coarse).resize((70, 60), Image.Resampling.BICUBIC).save(path, quality=90)
    prepare(Data(name="folder", path=str(tmp_path / "in"), image_size=32, crop=crop, val_images=4), tmp_path / "out")
    data = load(tmp_path / "out")
    m, augment = data.manifest, Augment(**data.manifest["augment"])
    about = data.pixels["train"], data.splits["train"][1], m["mean"], m["std"], 16
    here = KINDS["workers"](*about, torch.device("cpu"), 0, augment)
    there = KINDS["dali"](*about, torch.device("cuda"), 0, augment)
    for number in (1, 2):
        for a, b in zip(here.epoch(number), there.epoch(number), strict=True):
            assert torch.equal(a.ids, b.ids.cpu())
            assert b.images.device.type == b.labels.device.type == "cuda"
            gap = ((a.images - b.images.cpu()) / here.scale).abs()
            assert gap.mean() < (0.01 if crop == "pad" else 2), "levels of 255"


def together(names: list[str], speed: Speed, side_by_side: Turns) -> list[dict[str, Tensor]]:
    """The weights of students that took ten steps side by side from one pass of the teacher."""
    device = torch.device("cuda")
    g = torch.Generator().manual_seed(0)
    images, labels = torch.randint(0, 256, (320, 3, 32, 32), generator=g, dtype=torch.uint8), torch.arange(320) % 4
    about = images, labels, (0.5,) * 3, (0.25,) * 3, 32, device
    torch.manual_seed(1)
    teacher = build("wrn_16_1", 4).eval().requires_grad_(False)
    methods = []
    for name in names:
        torch.manual_seed(2)
        student = build("resnet8", 4)
        hp = METHODS[name].Config(**tiny.QUICK.get(name, {}))
        methods.append(
            METHODS[name](Setup(student, teacher, probe(student, 32), probe(teacher, 32), labels, 32), hp).to(device)
        )
    teacher.to(device)
    optim = Optim(epochs=1, batch_size=32, lr=0.01, schedule="cosine")
    with ExitStack() as stack:
        trainings = []
        for i, method in enumerate(methods):
            stack.enter_context(quick(method, None if i else teacher, speed))
            torch.manual_seed(3)
            trainings.append(Training(method, optim, Resident(*about), lambda values, epoch: None))
        watch: Watch = lambda batches, *_: iter(batches)  # noqa: E731
        train = Resident(*about, 0, Augment(2, True), two_views=True)
        fit(trainings, partial(teacher_features, teacher), train, watch, lanes=side_by_side)
    return [{name: value.cpu() for name, value in method.student.state_dict().items()} for method in methods]


def apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """How far two networks are from one another, in units of the norm of one."""
    a, b = (torch.cat([value.flatten().double() for value in net.values()]) for net in (one, other))
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("speed", [Speed(), Speed(bf16=True, channels_last=True)], ids=str)
def test_students_in_streams_of_their_own_get_the_weights_of_turns(speed: Speed) -> None:
    names = ["kd", "fitnet", "at", "sp", "simkd", "srrl"]
    streams = Streams(len(names), torch.device("cuda"))
    for name, one, other in zip(names, together(names, speed, Turns()), together(names, speed, streams), strict=True):
        assert apart(one, other) < 0.02, name


def test_cuda_graphs_get_the_weights_of_eager_networks() -> None:
    names = ["kd", "mlkd", "simkd"]  # mlkd asks the teacher twice in a step
    graphs = Speed(compile="both", graphs=True)
    for name, one, other in zip(names, together(names, Speed(), Turns()), together(names, graphs, Graphs()), strict=True):
        assert apart(one, other) < 0.02, name


def test_the_optimiser_is_fused_on_the_gpu() -> None:
    net = torch.nn.Linear(3, 3).cuda()
    sgd, _ = make_optimizer(Phase("fit", lambda *_: {}, [Group(net)]), Optim())
    assert sgd.param_groups[0]["fused"]
