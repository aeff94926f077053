"""How much memory this process has taken at most since it was first asked, and what a device has left."""

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
MEMINFO = Path("/proc/meminfo")
GROUPS = Path("/proc/self/cgroup")
GROUP_ROOT = Path("/sys/fs/cgroup")


class PeakMemory:
    """Of the GPU where torch's tensors are there, else the growth of the resident memory (Linux).

    Args:
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        if device != "cuda" and CLEAR.exists():
            CLEAR.write_text("5")  # the peak starts anew from what is resident
        self.base = 0 if device == "cuda" else resident("VmRSS")

    def bytes(self) -> int:
        """The most so far; 0 where the system does not say."""
        if self.device == "cuda":
            import torch

            return int(torch.cuda.max_memory_allocated())
        return max(0, resident("VmHWM") - self.base)


def resident(field: str) -> int:
    """Bytes that the kernel has under the field; 0 where there is no such file."""
    lines = STATUS.read_text().splitlines() if STATUS.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def available_bytes() -> float:
    """What processes of this machine may still take of its memory, or of their control group's; no limit if unknown."""
    lines = MEMINFO.read_text().splitlines() if MEMINFO.is_file() else []
    free = next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable:")), math.inf)
    return min([free, *_left_to_groups()])


def _left_to_groups() -> list[float]:
    """What each control group with a limit, as SLURM and containers set them, has left; files it has read can go."""
    found = []
    for line in GROUPS.read_text().splitlines() if GROUPS.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names, key = GROUP_ROOT, ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):  # of the first version of control groups
            root, names = GROUP_ROOT / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            key = "total_inactive_file"
        else:
            continue
        folder = root / path.strip("/")
        while folder.is_relative_to(root):
            with suppress(OSError, ValueError):  # a group without a limit, or one that is not ours to read
                limit, used = (int((folder / name).read_text()) for name in names)
                known = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
                found.append(float(limit - used + int(known.get(key, 0))))
            folder = folder.parent
    return found


def free_bytes(device: Any) -> float:
    """What a tensor may still take on torch's device, if a GPU, the allocator's own reserve included; else no limit."""
    if device.type != "cuda":
        return math.inf
    import torch

    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + reserve)
