"""How fast the same training is computed: precision, layout of the memory, compiling, and a teacher made for answering.

For the time of a training both networks answer by a quicker way; a loss sees float32 whatever the networks compute in, and so
do memory banks, optimiser and all of the adapters but their convolutions.  What is measured (under `torch.inference_mode`) is
measured by the plain way.

precision  bf16: both networks, and convolutions of adapters, under autocast; on CUDA what stays float32 may use TF32 in
           matrix products
layout     channels_last: images, maps and the student's weights
compile    by torch.compile, for batches of the first one's shape: both networks (on a GPU as CUDA graphs), or (auto, on a CPU)
           the teacher, whose weights are then constants; where it fails, the network runs eagerly, and a line says so

The teacher answers from a copy that never changes: batch norms folded where that is sure (`fold`), weights in the layout and
cast once.  Who reads the teacher's own parts finds them as they were.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch._functorch.config as functorch
import torch._inductor.config as inductor
from torch import Tensor, nn

from pupil.distributed import world
from pupil.fold import fold
from pupil.lanes import home_of
from pupil.lazy import Lazy
from pupil.methods.alone import Alone
from pupil.methods.base import Method
from pupil.net import Net
from pupil.types import Features, UserError

PRECISIONS = ("float32", "bf16", "auto")
LAYOUTS = ("contiguous", "channels_last", "auto")
COMPILES = (False, True, "auto")
BF16_FLAGS = ("avx512_bf16", "amx_bf16")  # of x86 processors that multiply bf16
# a backward pass is compiled with its forward pass, so that it fails with it, and may be run more than once, as DOT does
BACKWARD = {"force_non_lazy_backward_lowering": True, "donated_buffer": False}
Run = Callable[[Net, Tensor], Features]


@dataclass(frozen=True)
class Speed:
    """What was chosen."""

    bf16: bool = False
    channels_last: bool = False
    compile: str = ""  # both | teacher
    graphs: bool = False  # compiled networks run as CUDA graphs
    why: str = ""  # of an automatic precision

    def __str__(self) -> str:
        graphs = ", in CUDA graphs" if self.graphs else ""
        precision = ("bf16" if self.bf16 else "float32") + (f" ({self.why})" if self.why else "")
        return ", ".join(
            [precision, *["channels-last"] * self.channels_last, *[f"{self.compile} compiled{graphs}"] * bool(self.compile)]
        )


def choose(precision: str, layout: str, compile: bool | str, device: torch.device) -> Speed:
    """`auto`: by what the device can do, and by what was measured to help (benchmarks/README.md)."""
    can, why = bf16_on(device)
    bf16 = can if precision == "auto" else precision == "bf16"
    last = layout == "channels_last" or (layout == "auto" and (bf16 or device.type == "cpu"))
    several = world() > 1
    if compile is True and several:
        raise UserError("compile: true works in one process, and there are several; use compile=false or processes=1")
    compiled = "both" if compile is True else "teacher" if compile == "auto" and device.type == "cpu" and not several else ""
    graphs = bool(compiled) and device.type == "cuda"
    return Speed(bf16, last, compiled, graphs, why if precision == "auto" else "")


def bf16_on(device: torch.device) -> tuple[bool, str]:
    """Whether the device multiplies bf16 in hardware, and how that is known."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major >= 8, f"CUDA capability {major}.{minor}"
    about = Path("/proc/cpuinfo")
    words = set(about.read_text().split()) if about.exists() else set()
    found = [flag for flag in BF16_FLAGS if flag in words]
    return bool(found), f"the processor has {found[0]}" if found else f"the processor shows no {' or '.join(BF16_FLAGS)}"


@contextmanager
def quick(method: Method | Alone, teacher: Net | None, speed: Speed) -> Iterator[None]:
    """For a while `features` of both networks go the quicker way; afterwards both are as before, with new weights."""
    student, products = method.student, torch.get_float32_matmul_precision()
    kinds = {net: type(net) for net in (student, teacher) if net is not None}
    if speed.bf16:
        torch.set_float32_matmul_precision("high")
    if teacher is not None:
        teacher.__dict__["answering"] = prepared(copy.deepcopy(teacher), speed)
    for net, kind in kinds.items():
        compiled = speed.compile == "both" or (speed.compile == "teacher" and net is teacher)
        run: Any = Compiled(kind.features, net is teacher, speed.graphs) if compiled else kind.features
        net.__class__ = type(
            kind.__name__, (Student if net is student else Teacher, kind), {"speed": speed, "run": staticmethod(run)}
        )
    arrange(student, torch.channels_last if speed.channels_last else torch.contiguous_format)
    changed = {m: InFloat32 for m in student.modules() if speed.bf16 and strided_depthwise(m)}
    changed |= {m: InBf16 for m in adapters(method) if speed.bf16}
    for module, quicker in changed.items():
        module.__class__ = quicker
    try:
        with cast(Any, functorch).patch(BACKWARD):
            yield
    finally:
        torch.set_float32_matmul_precision(products)
        for net, kind in kinds.items():
            net.__class__ = kind
            net.__dict__.pop("answering", None)
        for module in changed:
            module.__class__ = nn.Conv2d
        arrange(student, torch.contiguous_format)


class Student(Net):
    speed: Speed
    run: Run

    def features(self, x: Tensor) -> Features:
        if torch.is_inference_mode_enabled():
            return super().features(x)
        return answer(self, x, self.speed, self.run)


class Teacher(Net):
    """Frozen, so it can answer from its copy; in train mode it is not frozen."""

    speed: Speed
    run: Run
    answering: Net

    def features(self, x: Tensor) -> Features:
        if torch.is_inference_mode_enabled() or self.training:
            return super().features(x)
        with torch.no_grad():
            return answer(self.answering, x, self.speed, self.run)


def answer(net: Net, x: Tensor, speed: Speed, run: Run) -> Features:
    x = x.contiguous(memory_format=torch.channels_last if speed.channels_last else torch.contiguous_format)
    if not speed.bf16:
        return run(net, x)
    with torch.autocast(x.device.type, torch.bfloat16):
        part = run(net, x)
    return cast(Features, Lazy(part, Tensor.float, home=home_of(x)))


def prepared(net: Net, speed: Speed) -> Net:
    """A frozen network made for answering, in place."""
    fold(net)
    for module in net.modules() if speed.bf16 else ():
        if type(module) in (nn.Conv2d, nn.Linear):  # what autocast would cast anew in every step
            module.to(torch.bfloat16)
    arrange(net, torch.channels_last if speed.channels_last else torch.contiguous_format)
    return net


def arrange(net: nn.Module, layout: torch.memory_format) -> None:
    net.to(memory_format=layout)  # pyright: ignore[reportCallIssue]


def strided_depthwise(module: nn.Module) -> bool:
    """Whether its backward pass in bf16 is slow on a CPU: 73 ms where float32 takes 3, at 64 x 64 x 32 x 32."""
    if type(module) is not nn.Conv2d or module.weight.device.type != "cpu":
        return False
    return module.groups == module.in_channels > 1 and max(module.stride) > 1


def adapters(method: Method | Alone) -> list[nn.Module]:
    """The convolutions that a method trains beside the student."""
    inside = set(method.student.modules())
    return [m for m in method.modules() if type(m) is nn.Conv2d and m not in inside]


class InBf16(nn.Conv2d):
    """A convolution that is computed in bf16, from float32 to float32."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, torch.bfloat16):
            return super().forward(input).float()


class InFloat32(nn.Conv2d):
    """A convolution that autocast leaves alone."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


class Compiled:
    """A network's features, compiled for batches of one shape; others go the eager way, as do all after a failure."""

    def __init__(self, eager: Run, frozen: bool, graphs: bool) -> None:
        """`frozen`: the weights never change, and may be packed as the processor likes them."""
        self.eager = eager
        self.quick: Any = torch.compile(eager, dynamic=False, mode="reduce-overhead" if graphs else None)
        # torch.compile's own option of this name comes too late: weights are then inputs of the graph, and nothing is packed
        self.freezing = partial(cast(Any, inductor).patch, freezing=frozen)
        self.shape: torch.Size | None = None

    def __call__(self, net: Net, x: Tensor) -> Features:
        self.shape = self.shape or x.shape
        if self.quick is None or x.shape != self.shape:
            return self.eager(net, x)
        try:
            with self.freezing():
                return self.quick(net, x)
        except Exception as e:  # no compiler, an operation that it does not know, ...
            first = next((line.strip() for line in str(e).splitlines() if line.strip()), "no reason given")
            print(f"compile: this network runs eagerly, for torch.compile failed: {type(e).__name__}: {first}", flush=True)
            self.quick = None
            return self.eager(net, x)
