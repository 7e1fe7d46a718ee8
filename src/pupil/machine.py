"""What the machine is, and what it is doing at the moment."""

import contextlib

import torch

from pupil import distributed


def describe(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return f"{distributed.world()} processes, {name}" if distributed.world() > 1 else name


def usage(device: torch.device) -> dict[str, float]:
    """System metrics of the moment, where psutil is installed; MLflow shows `system/` apart."""
    values: dict[str, float] = {}
    try:
        import psutil
    except ImportError:
        pass
    else:
        values["system/cpu_utilization_percentage"] = psutil.cpu_percent()
        values["system/system_memory_usage_megabytes"] = psutil.virtual_memory().used / 1e6
        values["system/process_memory_megabytes"] = psutil.Process().memory_info().rss / 1e6
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        values["system/gpu_0_memory_usage_megabytes"] = (total - free) / 1e6
        with contextlib.suppress(Exception):  # needs NVIDIA's management library, which a bare machine lacks
            values["system/gpu_0_utilization_percentage"] = float(torch.cuda.utilization(device))
    return values
