"""What may go wrong around a training, in one line."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from pupil.assemble import Job
from pupil.data import Prepared
from pupil.data.memory import free_memory
from pupil.feeds import pick_device
from pupil.resume import Keeper, Stopped
from pupil.room import advice, need
from pupil.settings import Settings
from pupil.types import UserError

AGAIN = "run the same command: it goes on"


@contextmanager
def explained(groups: Sequence[Sequence[Job]], data: Prepared, settings: Settings, keeper: Keeper) -> Iterator[None]:
    """Of disks, memory, data and the processes that make batches.  What nobody can mend but in the code stays as it is."""
    try:
        yield
        return
    except BrokenPipeError:
        raise
    except OSError as e:
        data.refuse_changed()
        where = f"{e.filename}: " if e.filename else ""
        line = f"{where}{e.strerror or last_line(e)}; mend that and {AGAIN}"
    except (RuntimeError, MemoryError) as e:
        if out_of_memory(e):
            line = ""
        elif "DataLoader worker" in str(e):
            data.refuse_changed()
            if keeper.asked:  # a scheduler's signal to all of the job
                raise Stopped(f"stopped by {keeper.asked}, {keeper.kept()}") from None
            line = f"a process that makes batches has died ({last_line(e)}), often for want of memory; {AGAIN}"
        else:
            raise
    raise UserError(line or no_room(groups, data, settings)) from None  # out here nothing holds on to what was computed


def out_of_memory(e: Exception) -> bool:
    return isinstance(e, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(e)


def no_room(groups: Sequence[Sequence[Job]], data: Prepared, settings: Settings) -> str:
    """By a step on two images of each student of a group, on the CPU."""
    device, jobs = pick_device(settings.device), groups[0]
    key = "teacher.optim.batch_size" if jobs[0].params["role"] in ("teacher", "shkd") else "optim.batch_size"
    batch_size, m = jobs[0].optim.batch_size, data.manifest
    for job in jobs:
        job.method.zero_grad()
        job.method.to("cpu")
        if job.teacher is not None:
            job.teacher.to("cpu")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        found = [need(job.method, job.teacher, len(m["classes"]), m["image_size"])[0] for job in jobs]
    except Exception:
        words = f"use {key}={max(2, batch_size // 2)}"
    else:
        words = advice(found, free_memory(device), batch_size, key)
    return f"out of memory on {device} at {key}={batch_size}: {words} (which begins anew), or precision=bf16"


def last_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[-1][:200]
