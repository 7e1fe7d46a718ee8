"""Training in several processes with the numbers of one: the setting `processes`, or torchrun on a stage's script.

Every process has the seeds, the batches, the method and the optimiser of a single one.  What is divided is the work of
the networks (`divided`): what a loss reads of their outputs is that of the whole batch, in every process.
"""

import atexit
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pupil.types import UserError

PATIENCE = 30.0  # seconds that the first process has to say what is wrong before another does


def rank() -> int:
    """This process's number among those that torchrun started."""
    return int(os.environ["RANK"]) if started() else 0


def world() -> int:
    """How many processes torchrun started."""
    return int(os.environ["WORLD_SIZE"]) if started() else 1


def started() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


def spread(processes: int) -> None:
    """Starts this stage again in so many processes, unless torchrun did; what the settings got wrong is said by now."""
    if processes > 1 and not started():
        sys.stdout.flush()
        start = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
        os.execv(sys.executable, (sys.executable, *start, *sys.argv))


def hush() -> None:
    """The first process speaks for all."""
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def give_way() -> None:
    """What stops one process stops all: the first one says why, and torchrun ends the others."""
    if rank():
        time.sleep(PATIENCE)


def refuse(stage: str) -> None:
    """For what writes files and trains nothing."""
    if world() > 1:
        raise UserError(f"{stage} runs in one process, got {world()} of torchrun; start it with python")


def join(device: torch.device) -> torch.device:
    """Meets the other processes, if there are any; gives this one's device."""
    if world() == 1:
        return device
    if device.type == "cuda":
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if device.index is not None or here > gpus:
            raise UserError(f"device={device}: {here} processes need device=cuda and a GPU each, and there are {gpus} GPUs")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return device


def from_first(file: Path | None, device: torch.device) -> bytes | None:
    """What the first process's file holds, for all of them; None where it names none.  Disks may be apart."""
    raw = b"" if file is None else file.read_bytes()
    if not several():
        return raw or None
    length = torch.tensor([len(raw)], device=device)
    dist.broadcast(length, 0)
    if not length.item():
        return None
    sent = torch.zeros(int(length.item()), dtype=torch.uint8, device=device)
    if raw:
        sent.copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
    dist.broadcast(sent, 0)
    return sent.cpu().numpy().tobytes()


def several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def average(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Over the processes; which of them are None is the same on all."""
    found = [g for g in gradients if g is not None]
    if not found or not several():
        return list(gradients)
    flat = torch.cat([g.reshape(-1) for g in found])
    dist.all_reduce(flat)
    parts = iter((flat / dist.get_world_size()).split([g.numel() for g in found]))
    return [None if g is None else next(parts).view(g.shape) for g in gradients]


def average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Of what the optimizer trains, in place."""
    if several():
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for p, g in zip(parameters, average([p.grad for p in parameters]), strict=True):
            p.grad = g
