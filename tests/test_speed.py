"""The quicker ways of computing give what the plain way gives, to their rounding, and leave everything as it was."""

import copy
import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode

from pupil import models, speed
from pupil.checks import check
from pupil.config import load_settings
from pupil.divided import divided
from pupil.fit import activate, step, teacher_features
from pupil.fold import fold
from pupil.methods import METHODS
from pupil.methods.alone import Alone
from pupil.methods.base import Method
from pupil.net import Net, evaluating, probe
from pupil.optim import Optim, make_optimizer
from pupil.speed import Speed, choose, quick
from pupil.types import Features, UserError
from tests import tiny

CPU = torch.device("cpu")
BF16 = Speed(bf16=True, channels_last=True)


def randomised(net: Net) -> Net:
    """Statistics, scales and shifts as after a training, such that no map vanishes or explodes."""
    g = torch.Generator().manual_seed(0)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for tensor, low, high in (
                (m.running_mean, -0.3, 0.3),
                (m.running_var, 0.5, 1.5),
                (m.weight, 0.7, 1.2),
                (m.bias, -0.2, 0.2),
            ):
                assert tensor is not None
                tensor.data.copy_(low + (high - low) * torch.rand(tensor.shape, generator=g))
    return net.requires_grad_(False).eval()


def tensors(f: Features) -> dict[str, Tensor]:
    found = {"stem": f.stem, "last": f.last, "embedding": f.embedding, "logits": f.logits}
    return found | {f"map {i}": x for i, x in enumerate(f.maps)} | {f"pre {i}": x for i, x in enumerate(f.pre)}


def furthest(a: Features, b: Features) -> float:
    """The largest difference of any tap, by the tap's largest number."""
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    return max(((ours[k] - theirs[k]).abs().max() / theirs[k].abs().max().clamp(min=1e-6)).item() for k in ours)


# --- folding ---------------------------------------------------------------------------------------------------------------

LARGE = {name for name in models.NETWORKS if name.startswith(("imagenet", "mdistiller", "vgg_imagenet", "spot_vgg"))}

UNFOLDED = {name for name in models.NETWORKS if "_wrn_" in name}  # dropout stands between, and their blocks are not traced


@pytest.mark.parametrize("name", models.NETWORKS)
@torch.no_grad()
def test_folded_network_has_the_same_taps(name: str) -> None:
    torch.manual_seed(0)
    net = randomised(models.build(name, 7))
    folded = copy.deepcopy(net)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    count = fold(folded)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) == norms - count
    if name in UNFOLDED:
        assert not count
        return
    assert count >= norms // 3, "every second norm of pre-activation blocks, and all of others"
    x = torch.randn(2, 3, 64 if name in LARGE else 32, 64 if name in LARGE else 32)
    assert furthest(folded.features(x), net.features(x)) < 1e-5
    assert furthest(folded.features(x), net.features(0.9 * x)) > 1e-4, "the comparison sees a difference"


class Twice(nn.Module):
    """Uses a convolution for more than the norm after it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        if self.way == "sum":
            return h + self.norm(h)
        if self.way == "again":
            return self.norm(self.conv(h))
        return self.norm(h) * self.conv.weight.sum()


@pytest.mark.parametrize("way", ["sum", "again", "weight"])
@torch.no_grad()
def test_what_is_not_surely_adjacent_is_not_folded(way: str) -> None:
    net = randomised(Net(Twice(way), [], nn.Linear(3, 2)))
    x = torch.randn(2, 3, 8, 8)
    before = net.features(x)
    assert fold(net) == 0
    assert torch.equal(net.features(x).logits, before.logits)


class ByData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_network_that_cannot_be_traced_is_left_as_it_is() -> None:
    net = randomised(Net(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), ByData()), [], nn.Linear(3, 2)))
    before = tiny.state(net)
    folded = fold(net)
    assert folded in (0, 1)  # a module that cannot be traced is called, the rest is traced
    assert folded or tiny.same(before, tiny.state(net))


# --- a training ------------------------------------------------------------------------------------------------------------


def steps(method: Method | Alone, teacher: Net | None, how: Speed | None, n: int = 2, **options: Any) -> list[float]:
    """The loss of each step of the first phase."""
    phase = method.phases()[0]
    if phase.before is not None:
        torch.manual_seed(6)
        phase.before(tiny.loader().epoch(0))
    activate(method, phase)
    optimizer, _ = make_optimizer(phase, Optim(lr=0.005, milestones=(), **options))
    batches = list(tiny.loader(0, samples=8 * n).epoch(1))
    batches = [b._replace(strong=b.images.flip(3)) for b in batches]
    found = []
    torch.manual_seed(7)
    with within(method, teacher, how):
        for batch in batches:
            terms = step(method, teacher_features(teacher, batch), batch, phase, optimizer, {} if options else None)
            assert all(term.raw.dtype == torch.float32 for term in terms.values()), "losses are float32"
            found.append(sum(term.weight * term.raw.item() for term in terms.values()))
    return found


@contextmanager
def within(method: Method | Alone, teacher: Net | None, how: Speed | None) -> Iterator[None]:
    if how is None:
        yield
    else:
        with quick(method, teacher, how):
            yield


CANCELLING = {"refilled"}  # its first loss is a small difference of large distances
SAMPLED = {"sakd"}  # draws by probabilities that rounding moves


@pytest.mark.parametrize("teacher", tiny.TEACHERS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_computes_its_loss_to_the_precision(name: str, teacher: str) -> None:
    losses: dict[str, list[float]] = {}
    for way, how in {"plain": None, "float32": Speed(channels_last=True), "bf16": BF16}.items():
        method = tiny.make(name, teacher=teacher)
        losses[way] = steps(method, method.teacher, how)
    assert losses["float32"] == pytest.approx(losses["plain"], rel=1e-3 if name in CANCELLING else 1e-4)
    if name not in SAMPLED:
        assert losses["bf16"] == pytest.approx(losses["plain"], rel=0.06)
    assert losses["bf16"] != losses["plain"]


def test_alone_in_bf16() -> None:
    plain, fast = (steps(Alone(tiny.setup().student), None, how, 4) for how in (None, BF16))
    assert fast == pytest.approx(plain, rel=0.02)
    assert fast != plain


def test_both_networks_are_left_as_they_were_with_new_weights() -> None:
    method = tiny.make("simkd")
    student, teacher = method.student, method.teacher
    kinds, before, known = (type(student), type(teacher)), tiny.state(teacher), tiny.state(student)
    layouts = {k: v.stride() for k, v in student.state_dict().items()}
    steps(method, teacher, BF16)
    assert (type(student), type(teacher)) == kinds
    assert tiny.same(tiny.state(teacher), before)
    assert not tiny.same(tiny.state(student), known)
    assert {k: v.stride() for k, v in student.state_dict().items()} == layouts
    assert all(v.dtype != torch.bfloat16 for v in student.state_dict().values())
    assert not {"answering", "run", "speed"} & (teacher.__dict__.keys() | student.__dict__.keys())


def test_an_error_leaves_them_as_they_were_too() -> None:
    method = tiny.make("kd")
    with pytest.raises(ZeroDivisionError), quick(method, method.teacher, BF16):
        raise ZeroDivisionError
    assert (type(method.student), type(method.teacher)) == (Net, Net)


def test_what_is_measured_is_measured_in_float32() -> None:
    method = tiny.make("kd")
    x = tiny.first_batch().images
    with torch.inference_mode(), evaluating(method.student):
        expected = method.student(x), method.teacher(x)
        with quick(method, method.teacher, Speed(bf16=True)):
            assert torch.equal(method.student(x), expected[0])
            assert torch.equal(method.teacher(x), expected[1])


def test_the_way_in_bf16_is_in_bf16_and_what_a_loss_reads_is_not() -> None:
    method = tiny.make("kd")
    x = tiny.first_batch().images
    seen: list[torch.dtype] = []
    method.student.stages[0].register_forward_hook(lambda m, i, o: seen.append(o[1].dtype))
    with quick(method, method.teacher, BF16):
        f = method.student.features(x)
    assert seen == [torch.bfloat16]
    assert {t.dtype for t in tensors(f).values()} == {torch.float32}
    assert f.maps[-1] is f.maps[-1], "cast once"
    assert f.maps[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["MobileNetV2", "ShuffleV2", "mobilenet_v1"])
def test_strided_depthwise_convolutions_stay_float32(name: str) -> None:
    torch.manual_seed(0)
    method = Alone(models.build(name, 4))
    kinds = [type(m) for m in method.student.modules()]
    with quick(method, None, BF16):
        slow = [m for m in method.student.modules() if isinstance(m, speed.InFloat32)]
        assert slow
        method.student.features(torch.randn(2, 3, 32, 32)).logits.sum().backward()
    assert all(m.weight.grad is not None for m in slow)
    assert [type(m) for m in method.student.modules()] == kinds


# --- synchronisation -------------------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device: a number or a size that depends on the data."""

    NAMES = (
        "aten::_local_scalar_dense",
        "aten::nonzero",
        "aten::equal",
        "aten::masked_select",
        "aten::_unique2",
        "aten::is_nonzero",
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        masks = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if masks or name in self.NAMES:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


WAITING = {
    ("sakd", "distil"): "the numbers of images that each spot is distilled on",
    ("refilled", "embed"): "the pairs of images of one class in the batch",
}


@pytest.mark.parametrize("name", METHODS)
def test_a_step_does_not_make_the_host_wait(name: str) -> None:
    method = tiny.make(name)
    batch = tiny.first_batch()
    waiting = []
    for phase in method.phases():
        if phase.before is not None:
            phase.before(tiny.loader().epoch(0))
        activate(method, phase)
        optimizer, _ = make_optimizer(phase, Optim(lr=0.005, milestones=()))
        with quick(method, method.teacher, BF16), Waits() as waits:
            step(method, teacher_features(method.teacher, batch), batch, phase, optimizer)
        waiting += [(name, phase.name)] if waits.found else []
    assert waiting == [place for place in WAITING if place[0] == name]


def test_waits_are_seen() -> None:
    x = torch.arange(3.0)
    with Waits() as waits:
        x.sum().item()
        x[x > 1]
        bool((x > 5).any())
    assert waits.found == ["aten::_local_scalar_dense", "aten::index", "aten::_local_scalar_dense"]


# --- the settings ----------------------------------------------------------------------------------------------------------


def test_auto_follows_the_hardware_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    for can, said in (
        (True, "bf16 (it can), channels-last, teacher compiled"),
        (False, "float32 (it can), channels-last, teacher compiled"),
    ):
        monkeypatch.setattr(speed, "bf16_on", lambda device, can=can: (can, "it can"))
        assert str(choose("auto", "auto", "auto", CPU)) == said
        assert str(choose("float32", "contiguous", False, CPU)) == "float32"
        assert str(choose("bf16", "contiguous", True, CPU)) == "bf16, both compiled"


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("precision", "fp16", "precision: there is no 'fp16'; "),
        ("layout", "channel_last", "layout: there is no 'channel_last'; did you mean 'channels_last'"),
        ("compile", "yes", "compile: expected false, true or auto, got yes"),
    ],
)
def test_unknown_values_are_refused(key: str, value: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        check(dataclasses.replace(load_settings(), **{key: value}))


def test_compiling_in_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="compile: expected false with several processes, got True"):
        check(dataclasses.replace(load_settings(), compile=True, processes=2))
    monkeypatch.setattr(speed, "world", lambda: 2)
    with pytest.raises(UserError, match="works in one process"):
        choose("float32", "auto", True, CPU)


def test_failing_compiler_leaves_an_eager_network_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(run: Any, **options: Any) -> Any:
        def call(*args: Any) -> Any:
            raise RuntimeError("no compiler here\nand more lines")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    method = tiny.make("kd")
    plain = steps(tiny.make("kd"), tiny.make("kd").teacher, Speed())
    assert steps(method, method.teacher, Speed(compile="both")) == plain
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["compile: this network runs eagerly, for torch.compile failed: RuntimeError: no compiler here"] * 2


def test_compiled_training_is_the_eager_one(capsys: pytest.CaptureFixture[str]) -> None:
    """By torch.compile's first half: no C++ compiler is needed."""
    method, other = tiny.make("kd"), tiny.make("kd")
    original = torch.compile
    try:
        torch.compile = lambda run, **options: original(run, backend="aot_eager")  # type: ignore[assignment]
        found = steps(method, method.teacher, Speed(compile="both"), optimizer="dot")
    finally:
        torch.compile = original
    assert found == pytest.approx(steps(other, other.teacher, None, optimizer="dot"), rel=1e-4)
    assert not capsys.readouterr().out


def test_probe_of_a_quick_teacher_has_the_plain_shapes() -> None:
    method = tiny.make("kd")
    shapes = {k: v.shape for k, v in tensors(probe(method.teacher, tiny.SIZE)).items()}
    with quick(method, method.teacher, BF16):
        assert {k: v.shape for k, v in tensors(probe(method.teacher, tiny.SIZE)).items()} == shapes


# --- several processes -----------------------------------------------------------------------------------------------------


def work(rank: int, processes: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet-{processes}", rank=rank, world_size=processes)
    found = {}
    for name in ("kd", "simkd"):
        method = tiny.make(name)
        with divided(method, method.teacher):
            found[name] = steps(method, method.teacher, BF16)
    torch.save(found, folder / f"{processes}-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_in_bf16_as_one_does(tmp_path: Path) -> None:
    for n in (1, 2):
        spawn(work, (n, tmp_path), n)
    alone, one, other = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert one == other
    for name in alone:
        assert one[name] == pytest.approx(alone[name], rel=5e-3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_teacher_compiled_in_earnest_gives_the_plain_taps(capsys: pytest.CaptureFixture[str]) -> None:
    method = tiny.make("kd")
    randomised(method.teacher)
    x = tiny.first_batch().images
    with torch.no_grad():
        plain, part = method.teacher.features(x), method.teacher.features(x[:5])
        with quick(method, method.teacher, Speed(compile="teacher", channels_last=True)):
            assert furthest(method.teacher.features(x), plain) < 1e-5
            assert furthest(method.teacher.features(x[:5]), part) < 1e-5
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                method.teacher.features(x)
    called = {event.key for event in profile.key_averages()}
    assert "mkldnn::_convolution_pointwise" in called, "convolutions with their weights packed, and what follows them within"
    assert not capsys.readouterr().out
