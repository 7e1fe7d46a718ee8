"""Processor, memory and GPU, and what torch makes of them."""

import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

from pupil import driver
from pupil.doctor.finding import SETUP, Finding

SYSTEM = Path("/")  # where /proc, /sys and /dev are
LEAST_MEMORY, LEAST_SHARED = 2e9, 256e6  # bytes; a container of Docker's has 64e6 of shared memory unless told otherwise


def gpu(root: Path) -> Iterator[Finding]:
    try:
        import torch
    except Exception as e:  # not there, or its libraries are not
        yield Finding("torch", f"cannot be imported ({type(e).__name__}: {(str(e).splitlines() or [''])[0]})", SETUP)
        return
    devices = driver.gpus() or listed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the driver is too old is said below
        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    about, cuda = f"torch {torch.__version__}", torch.version.cuda
    if seen:
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(seen))
        yield Finding("GPU", f"{about} (CUDA {cuda}) sees {names}")
    elif not devices:
        loaded = "; a driver is loaded, but this container was given no GPU" if driver.DRIVER.exists() else ""
        yield Finding("GPU", f"none here, trainings run on the CPU ({about}){loaded}")
    elif driver.hidden():
        yield Finding("GPU", "hidden by CUDA_VISIBLE_DEVICES, trainings run on the CPU", "unset CUDA_VISIBLE_DEVICES")
    elif cuda is None:
        yield Finding("GPU", f"{', '.join(devices)} is here, but {about} is built without CUDA", SETUP)
    else:
        why = "is the driver too old for it, or its module not loaded? it says"
        yield Finding("GPU", f"{', '.join(devices)} is here, but {about} (CUDA {cuda}) sees none: {why}", "nvidia-smi")


def listed() -> list[str]:
    """What nvidia-smi says, where devices have other names (WSL)."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.split(" (")[0] for line in done.stdout.splitlines() if line.startswith("GPU ")]


def threads(root: Path) -> Iterator[Finding]:
    """More threads than cores, or threads that spin while they wait, slow a training down many times over."""
    cores, share = len(os.sched_getaffinity(0)), quota()
    usable = cores if share is None else max(1, min(cores, round(share)))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    said = f"{usable} cores" + (f" (of {cores}, by the container's limit)" if usable < cores else "")
    if asked.isdigit() and int(asked) > usable:
        yield Finding("threads", f"OMP_NUM_THREADS={asked} on {said}", "unset OMP_NUM_THREADS")
    elif usable < cores and not asked:
        yield Finding("threads", f"{said}, and torch takes {cores} threads", f"export OMP_NUM_THREADS={usable}")
    else:
        yield Finding("threads", said)
    spin, policy = os.environ.get("GOMP_SPINCOUNT", ""), os.environ.get("OMP_WAIT_POLICY", "")
    if policy.lower() == "active":
        yield Finding("idle threads", "OMP_WAIT_POLICY=active makes them spin", "unset OMP_WAIT_POLICY")
    elif not (spin.isdigit() and int(spin) <= 100_000):
        yield Finding("idle threads", f"GOMP_SPINCOUNT={spin or 'nothing'} makes them spin", "export GOMP_SPINCOUNT=1000")
    else:
        yield Finding("idle threads", f"sleep soon (GOMP_SPINCOUNT={spin})")


def quota() -> float | None:
    """Cores that the container may use, if it is limited."""
    words = read("sys/fs/cgroup/cpu.max").split() or ["max"]
    if words[0] != "max":
        return int(words[0]) / int(words[1])
    old = read("sys/fs/cgroup/cpu/cpu.cfs_quota_us").strip(), read("sys/fs/cgroup/cpu/cpu.cfs_period_us").strip()
    return int(old[0]) / int(old[1]) if old[0].isdigit() and old[1].isdigit() else None


def memory(root: Path) -> Iterator[Finding]:
    lines = dict(line.split(":", 1) for line in read("proc/meminfo").splitlines() if ":" in line)
    free = [int(lines["MemAvailable"].split()[0]) * 1024] if "MemAvailable" in lines else []
    limit, used = (read(f"sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    if limit.isdigit() and used.isdigit():
        cache = next((x.split()[1] for x in read("sys/fs/cgroup/memory.stat").splitlines() if x.startswith("file ")), "0")
        free.append(int(limit) - int(used) + int(cache))
    if not free:
        yield Finding("memory", "the system does not say how much is free")
    elif min(free) < LEAST_MEMORY:
        yield Finding(
            "memory", f"{min(free) / 1e9:.1f} GB free, 2 are needed: stop what else runs", "ps aux --sort -rss | head"
        )
    else:
        yield Finding("memory", f"{min(free) / 1e9:.1f} GB free")


def shared_memory(root: Path) -> Iterator[Finding]:
    """Worker processes hand over their batches in it, and die on a full one."""
    place = SYSTEM / "dev/shm"
    if not place.is_dir():
        yield Finding("shared memory", f"{place} is not there: loader: workers cannot work", f"mount -t tmpfs shm {place}")
        return
    total = shutil.disk_usage(place).total
    said = f"{total / 1e6:,.0f} MB in {place}"
    if total < LEAST_SHARED:
        more = f"mount -o remount,size=2g {place} (in Docker: docker run --shm-size 2g)"
        yield Finding("shared memory", f"{said}, little for loader: workers", more)
    else:
        yield Finding("shared memory", said)


def read(name: str) -> str:
    try:
        return (SYSTEM / name).read_text()
    except OSError:
        return ""
