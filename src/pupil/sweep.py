"""Sweeps whose jobs run elsewhere: `-m hydra/launcher=submitit_slurm`, or `submitit_local` for processes of this machine.

A job is the stage in a process that submitit starts: with the settings of the moment it was submitted and the code of this
checkout.  Tasks of one job (hydra.launcher.nodes, tasks_per_node) share its training as the processes of torchrun do.
"""

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pupil import distributed
from pupil.types import UserError


def launcher(words: Sequence[str]) -> str | None:
    """The launcher that is asked for, if it starts jobs elsewhere."""
    names = [word.partition("=")[2] for word in words if word.startswith("hydra/launcher=")]
    if not names or names[-1] == "basic":
        return None
    if not {"-m", "--multirun"} & set(words):
        raise UserError(f"hydra/launcher={names[-1]} starts the jobs of a sweep; add -m")
    return names[-1]


@contextmanager
def submitting(name: str, root: Path) -> Iterator[None]:
    """Lets the jobs find the code of the checkout `root`, waits for them, and says in one line what went wrong."""
    paths = [str(root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    print(f"{name}: waiting for the jobs; what they say is in runs/multirun/.submitit/*/*_log.out", flush=True)
    try:
        yield
    except Exception as e:  # of submitit, or of a job, whose log has all of it
        if isinstance(e, UserError) or type(e).__module__.startswith(("hydra.", "omegaconf.")):
            raise
        reason = " ".join(line.strip() for line in str(e).splitlines()[:2])
        raise UserError(f"{name}: {type(e).__name__}: {reason}; see runs/multirun/.submitit/*/*_log.err") from None
    print(f"{name}: all jobs are done", flush=True)


@contextmanager
def in_a_job(command: Sequence[str], processes: int) -> Iterator[None]:
    """Around a stage in a process of submitit.  Errors go to the job's log, and to whoever waits for the job.

    `command`: what would do the same by hand, which the record keeps.
    """
    from submitit.helpers import TorchDistributedEnvironment  # pyright: ignore[reportMissingImports]

    sys.argv[:] = command
    about = TorchDistributedEnvironment()
    if about.world_size > 1:
        about.export(set_cuda_visible_devices=False, overwrite=True)
        os.environ["TORCHELASTIC_RUN_ID"] = "submitit"  # by which torch knows that another one started the processes
        distributed.hush()
    try:
        if processes > 1 and about.world_size != processes:
            raise UserError(
                f"processes={processes}: a job of submitit is shared by its tasks, and this one has {about.world_size};"
                f" use processes=1 hydra.launcher.tasks_per_node={processes}"
            )
        yield
    except UserError as e:
        distributed.give_way()
        sys.stderr.write(f"error: {' '.join(str(e).split())}\n")
        raise
    except Exception:
        distributed.give_way()
        traceback.print_exc()
        raise
