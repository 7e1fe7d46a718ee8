"""SimKD: what is deployed, at every factor and map size, with ImageNet networks, from SH-KD teachers, and as a teacher."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pupil import assemble, checkpoint, imported, measures, session
from pupil import settings as settings_of
from pupil.data import Prepared
from pupil.feeds import loaders as load_batches
from pupil.fit import activate, step, teacher_features
from pupil.methods import METHODS
from pupil.methods.base import Setup
from pupil.methods.simkd import SimKD, projector
from pupil.models import build
from pupil.net import FrozenLinear, probe
from pupil.optim import make_optimizer
from pupil.rows import cost
from pupil.settings import Settings
from pupil.speed import choose
from pupil.types import Batch, UserError
from tests import test_session, tiny
from tests.test_session import at

ground, without_mlflow = test_session.ground, test_session._without_mlflow  # fixtures


def made(student: str, teacher: str, size: int, **config: Any) -> SimKD:
    torch.manual_seed(0)
    s, t = build(student, tiny.CLASSES), build(teacher, tiny.CLASSES).requires_grad_(False).eval()
    return SimKD(Setup(s, t, probe(s, size), probe(t, size), tiny.loader().labels), SimKD.Config(**config))


# --- what is deployed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("c_in", "sizes"),
    [(256, (26_240, 70_400, 214_016)), (512, (34_432, 86_784, 246_784)), (704, (40_576, 99_072, 271_360))],
)
def test_the_projector_is_of_the_specification_s_size(c_in: int, sizes: tuple[int, int, int]) -> None:
    for factor, size in zip((8, 4, 2), sizes, strict=True):
        assert measures.parameters(nn.Sequential(*projector(c_in, 256, factor))) == size


def pooled(x: Tensor, side: int) -> Tensor:
    """Adaptive average pooling (B, C, H, W) -> (B, C, side, side), window by window."""
    n = x.shape[2]
    windows = [(math.floor(i * n / side), math.ceil((i + 1) * n / side)) for i in range(side)]
    return torch.stack([torch.stack([x[:, :, a:b, c:d].mean((2, 3)) for c, d in windows], 2) for a, b in windows], 2)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("student", "teacher", "size", "sides"),
    [
        ("resnet8", "resnet14x2", 20, (5, 5)),
        ("resnet8", "vgg8", 28, (7, 3)),
        ("ShuffleV2", "wrn_16_1", 28, (4, 7)),
        ("wrn_16_1", "ResNet18", 24, (6, 3)),
    ],
)
def test_the_student_answers_by_projector_and_the_teacher_s_classifier(
    factor: int, student: str, teacher: str, size: int, sides: tuple[int, int]
) -> None:
    method = made(student, teacher, size, factor=factor, ce=1.0)
    net, images = method.student, torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(1))
    assert (method.setup.s.maps[-1].shape[2], method.setup.t.last.shape[2]) == sides
    net.train()(images)  # moves the statistics
    net.eval()
    with torch.no_grad():
        f, t = net.features(images), method.teacher.features(images)
        layers = [m for m in net.neck.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.ReLU)]
        assert [m.out_channels for m in layers if isinstance(m, nn.Conv2d)][:2] == [t.last.shape[1] // factor] * 2
        x = f.maps[-1]
        last: Any = net.stages[-1]
        x = x if last.norm is None else last.norm(x).relu()
        x = pooled(x, t.last.shape[2]) if x.shape[2] > t.last.shape[2] else x
        for layer in layers:
            x = layer(x)
        torch.testing.assert_close(f.last, x)
        head: Any = method.teacher.head
        torch.testing.assert_close(net(images), x.mean((2, 3)) @ head.weight.T + head.bias)
        wanted = pooled(t.last, x.shape[2]) if t.last.shape[2] > x.shape[2] else t.last
        terms = method.loss(f, t, Batch(images, torch.zeros(6, dtype=torch.int64), torch.arange(6)))
    assert terms["knowledge"].raw.item() == pytest.approx((x - wanted).double().square().mean().item(), rel=1e-4)
    trained = measures.parameters(net.stem) + measures.parameters(net.stages) + measures.parameters(net.neck)
    assert measures.parameters(net) == trained + head.weight.numel() + head.bias.numel()
    assert isinstance(net.head, FrozenLinear)
    assert sum(p.numel() for p in method.parameters()) == trained


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("imagenet_shufflenet_v2_x0_5", "imagenet_resnet18"),
        ("imagenet_resnet18", "imagenet_resnet10x2"),
        ("imagenet_mobilenet_v2", "imagenet_resnet18"),
        ("imagenet_resnet18", "imagenet_shufflenet_v2_x0_5"),
    ],
)
def test_imagenet_networks_learn_and_come_back(student: str, teacher: str, tmp_path: Path) -> None:
    size = 64
    method = made(student, teacher, size)
    batch = Batch(torch.randn(4, 3, size, size), torch.arange(4) % tiny.CLASSES, torch.arange(4))
    (phase,) = method.phases()
    activate(method, phase)
    optimizer, _ = make_optimizer(phase, assemble.Optim(lr=0.01))
    before, t = tiny.state(method.student), teacher_features(method.teacher, batch)
    losses = [step(method, t, batch, phase, optimizer)["knowledge"].raw.item() for _ in range(2)]
    assert all(math.isfinite(loss) for loss in losses)
    changed = {key for key, value in tiny.state(method.student).items() if not torch.equal(value, before[key])}
    assert {name for name, _ in method.student.named_parameters()} <= changed
    assert not {"head.weight", "head.bias"} & changed
    meta = {"network": student, "method": "simkd", "surgery": method.surgery, "classes": list("abcd"), "image_size": size}
    checkpoint.save(tmp_path / "m", method.student.state_dict(), {**meta, "mean": [0.5] * 3, "std": [0.5] * 3})
    again, _ = checkpoint.load(tmp_path / "m")
    assert torch.equal(again(batch.images), method.student.eval()(batch.images))


def test_a_teacher_with_layers_before_its_classifier_is_refused() -> None:
    with pytest.raises(UserError, match=r"simkd .* that of spot_vgg8_imagenet has layers in between; use kd, fitnet or crd"):
        made("resnet8", "spot_vgg8_imagenet", 64)


# --- from folder to folder ------------------------------------------------------------------------------------------------


def trained(settings: Settings, data: Prepared, **train: Any) -> Path:
    """The folder of what a stage trains, without its record."""
    here = dataclasses.replace(settings, train=settings_of.Train(**train)) if train else settings
    job = assemble.single(here, data) if train else assemble.distillation(here, data)
    feeds = load_batches(data, job.optim.batch_size, job.seed, torch.device("cpu"))
    speed = choose(here.precision, here.layout, here.compile, torch.device("cpu"))
    weights = session.train([job], feeds, here, speed, [tiny.quiet], tiny.silently)[0].last
    meta = {**job.meta, **{key: data.manifest[key] for key in ("classes", "image_size", "mean", "std")}}
    checkpoint.save(Path(str(here.out)), weights, meta)
    return Path(str(here.out))


def taught(settings: Settings, folder: Path, method: str, teacher: Path, student: str = "resnet8") -> Settings:
    """A cell of the matrix under that teacher."""
    here = at(settings, folder, method, 0)
    return dataclasses.replace(here, distill=dataclasses.replace(here.distill, student=student, checkpoint=str(teacher)))


def test_what_simkd_deploys_teaches_and_its_parameters_are_all_counted(
    ground: tuple[Settings, Prepared], tmp_path: Path
) -> None:
    settings, data = ground
    teacher = Path(str(settings.distill.checkpoint))
    first = trained(taught(settings, tmp_path / "first", "simkd", teacher), data)
    net, meta = checkpoint.load(first)
    encoder = measures.parameters(build("resnet8", 10)) - 650
    expected = encoder + measures.parameters(nn.Sequential(*projector(64, 64, 2))) + 650
    assert cost(net, meta["image_size"])["parameters"] == expected, "as the table counts them"
    for method in ("simkd", "thkd"):
        here = taught(settings, tmp_path / method, method, first, "resnet14")
        again, facts = checkpoint.load(trained(here, data))
        ancestor = {"network": "resnet8", "role": "distilled", "sha256": meta["sha256"]}
        assert (facts["method"], facts["network"], facts["teacher"]) == (method, "resnet14", ancestor)
        if method == "simkd":
            assert tiny.same(tiny.state(again.head), tiny.state(net.head)), "that of the first teacher still"


def test_what_simkd_deploys_can_be_the_pipeline_s_teacher(ground: tuple[Settings, Prepared], tmp_path: Path) -> None:
    settings, data = ground
    first = trained(taught(settings, tmp_path / "first", "simkd", Path(str(settings.distill.checkpoint))), data)
    here = dataclasses.replace(
        at(settings, tmp_path / "teacher", None, 0),
        teachers=("resnet8",),
        train=settings_of.Train(role="teacher", network="resnet8"),
        teacher=dataclasses.replace(settings.teacher, checkpoint=str(first)),
    )
    imported.run(here, data)
    net, meta = checkpoint.load(tmp_path / "teacher" / "model")
    assert (meta["method"], meta["surgery"]) == ("simkd", checkpoint.read_meta(first)["surgery"])
    assert tiny.same(tiny.state(net), tiny.state(checkpoint.load(first)[0]))
    again, _ = checkpoint.load(trained(taught(settings, tmp_path / "next", "simkd", tmp_path / "teacher" / "model"), data))
    assert tiny.same(tiny.state(again.head), tiny.state(net.head))


@pytest.mark.parametrize("by", [None, "simkd", "thkd"])
def test_simkd_from_a_teacher_under_a_student_s_classifier(
    by: str | None, ground: tuple[Settings, Prepared], tmp_path: Path
) -> None:
    """The whole chain: a student (alone, or taught), a teacher under its frozen classifier, SimKD from that."""
    settings, data = ground
    if by is None:
        lender = trained(at(settings, tmp_path / "student", None, 0), data, role="student", network="resnet8", seed=0)
    else:
        lender = trained(taught(settings, tmp_path / "student", by, Path(str(settings.distill.checkpoint))), data)
    shkd = trained(at(settings, tmp_path / "shkd", None, 0), data, role="shkd", network="resnet14", seed=1, head_of=str(lender))
    student = trained(taught(settings, tmp_path / "simkd", "simkd", shkd), data)
    heads = [tiny.state(checkpoint.load(folder)[0].head) for folder in (lender, shkd, student)]
    assert tiny.same(heads[0], heads[1])
    assert tiny.same(heads[1], heads[2])
    assert checkpoint.read_meta(student)["teacher"]["role"] == "shkd"
    assert METHODS["simkd"] is SimKD
