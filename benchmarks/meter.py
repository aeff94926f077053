"""Clock and memory of one process, and what the machine beneath it can do."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

CLEAR_REFS = Path("/proc/self/clear_refs")


class Moment(NamedTuple):
    """When something was, on three clocks, all in seconds."""

    wall: float
    own_cpu: float
    machine_cpu: float
    """Busy time of all cores, whoever used them."""

    @classmethod
    def now(cls) -> "Moment":
        """This moment."""
        return cls(time.perf_counter(), time.process_time(), _machine_cpu())


class Meter:
    """Times the steps of a run, and its memory from :meth:`start` to the last step.

    Args:
        device: ``cpu`` or ``cuda``.
        warm_up: Steps that are not timed.
        processes: How many processes like this one take part.
    """

    def __init__(self, device: str, *, warm_up: int, processes: int) -> None:
        self.device = device
        self.warm_up = warm_up
        self.processes = processes
        self.base_mib = 0.0
        self.moments: list[Moment] = []

    def start(self) -> None:
        """Everything is imported, nothing is built."""
        if CLEAR_REFS.exists():
            CLEAR_REFS.write_text("5")  # the peak starts anew from what is resident
        self.base_mib = _status_mib("VmRSS")

    def tick(self) -> None:
        """A step has ended, and on a GPU is waited for."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.moments.append(Moment.now())

    def result(self) -> dict[str, float]:
        """Seconds a step, the peak memory increase in MiB, and how many cores others kept busy meanwhile."""
        first, last = self.moments[self.warm_up - 1], self.moments[-1]
        wall = last.wall - first.wall
        own = self.processes * (last.own_cpu - first.own_cpu)
        return {
            "seconds": wall / (len(self.moments) - self.warm_up),
            "peak_mib": self._peak_mib(),
            "own_cores": own / wall,
            "foreign_cores": max(0.0, last.machine_cpu - first.machine_cpu - own) / wall,
        }

    def _peak_mib(self) -> float:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return _status_mib("VmHWM") - self.base_mib


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _machine_cpu() -> float:
    user, nice, system, _, _, irq, soft_irq, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    return (user + nice + system + irq + soft_irq) / os.sysconf("SC_CLK_TCK")


def matmul_flops(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a product of two large square matrices."""
    size = 8_192 if device == "cuda" else 2_048
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / _fastest(lambda: left @ right, device)


def memory_bytes(device: str) -> float:
    """Bytes a second, read and written, of copying what no cache holds."""
    source = torch.zeros((1 << 31 if device == "cuda" else 1 << 28) // 4, device=device)
    target = torch.ones_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)


def _fastest(work: Callable[[], object], device: str, tries: int = 5) -> float:
    times = []
    for _ in range(tries + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])
