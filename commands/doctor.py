"""``doctor``: what this machine is good for, and what of its set-up contradicts itself or what was tested."""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from commands import options
from core.errors import ConfigurationError
from core.plain import loaded_file
from core.text import printable

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
NEEDED = ("torch", "lightning", "transformers", "datasets", "wandb", "torchmetrics", "jsonargparse")
OF_EXTRAS = {"peft": "lora", "bitsandbytes": "quantized", "fastapi": "serve"}
LITTLE_DISK_GB = 20.0
PROBE_S = 4.0
PROCESSES_LIMIT_S = 60.0
STYLES = {"ok": "green", "note": "yellow", "bad": "bold red"}


class Finding(NamedTuple):
    """How it is (ok, note, bad), of what, and in words."""

    level: str
    what: str
    told: str


def run() -> None:
    """Parse the command line, look, and end with exit code 1 where a run would fail."""
    own = options.doctor().parse_args(sys.argv[1:])
    if own.processes < 0 or own.processes == 1:
        raise ConfigurationError(f"--processes must be at least 2, got {own.processes}")
    trainer = trainer_options(own.config)
    looks: list[Callable[[], Iterator[Finding]]] = [versions, hardware, disk]
    looks += [] if own.offline else [reach]
    looks += [lambda: launch(os.environ, trainer)]
    looks += [lambda: processes(own.processes)] if own.processes else []
    console = Console()
    worst = "ok"
    for look in looks:
        for finding in look():
            line = Text.assemble((f"{finding.level:5}", STYLES[finding.level]), f"{finding.what:14} ", finding.told)
            console.print(line, soft_wrap=True)
            worst = max(worst, finding.level, key=list(STYLES).index)
    if worst == "bad":
        raise SystemExit(1)


def trainer_options(configs: list[str]) -> dict[str, Any]:
    """The trainer's options of the configs, the later of two going first."""
    options: dict[str, Any] = {}
    for config in configs:
        if not Path(config).is_file():
            raise ConfigurationError(f"--config {printable(config)} does not exist")
        options |= (loaded_file(Path(config)) or {}).get("trainer") or {}
    return options


def versions() -> Iterator[Finding]:
    """Python and the packages beside those that the checks ran with."""
    running = ".".join(platform.python_version_tuple()[:2])
    known = running in ("3.11", "3.12", "3.13")
    yield Finding("ok" if known else "note", "python", platform.python_version() + ("" if known else "; not tested"))
    tested = pinned_versions(CONSTRAINTS.read_text("utf-8"))
    for name in NEEDED:
        yield package(name, tested[name])
    for name, extra in OF_EXTRAS.items():
        found = installed(name)
        yield Finding("ok", name, found or f"not installed; pip install '.[{extra}]' where it is wanted")


def pinned_versions(constraints: str) -> dict[str, str]:
    """Package and version of each pin."""
    lines = (line.partition("#")[0].strip() for line in constraints.splitlines())
    return dict(line.split("==") for line in lines if "==" in line)


def installed(name: str) -> str:
    """The version of a package; empty where it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def package(name: str, tested: str) -> Finding:
    """A needed package: missing, of another release than the tested one, or as tested."""
    found = installed(name)
    if not found:
        return Finding("bad", name, "not installed: pip install -e . --constraint constraints.txt")
    plain = found.partition("+")[0]
    if plain == tested:
        return Finding("ok", name, found)
    other = plain.split(".")[:2] != tested.split(".")[:2]
    return Finding("note" if other else "ok", name, f"{found}; tested with {tested}")


def hardware() -> Iterator[Finding]:
    """GPUs and what they compute in, or the CPU."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    capability = torch.backends.cpu.get_cpu_capability()
    memory = f", {pages / 1e9:.0f} GB of memory" if pages else ""
    yield Finding("ok", "cpu", f"{cores} cores{memory}, {capability}")
    if not torch.cuda.is_available():
        why = "torch was built without CUDA" if torch.version.cuda is None else "torch sees none"
        yield Finding("note", "gpu", f"none ({why}): use --trainer.accelerator cpu and a small model")
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        bf16 = card.major >= 8
        told = f"{card.name}, {card.total_memory / 1e9:.0f} GB, compute capability {card.major}.{card.minor}"
        advice = "bf16" if bf16 else "no bf16: --trainer.precision 16-mixed in the place of bf16-mixed"
        yield Finding("ok" if bf16 else "note", f"gpu {index}", f"{told}, {advice}")
    if torch.distributed.is_available():
        backends = [name for name in ("nccl", "gloo") if getattr(torch.distributed, f"is_{name}_available")()]
        yield Finding("ok", "distributed", ", ".join(backends) or "no backend")


def disk() -> Iterator[Finding]:
    """Room for runs, and for what is fetched from the hub."""
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")).expanduser()
    for what, path in (("disk here", Path.cwd()), ("disk of hub", cache)):
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        free = shutil.disk_usage(there).free / 1e9
        writable = os.access(there, os.W_OK)
        told = f"{free:.0f} GB free at {printable(str(path))}"
        level = "bad" if not writable else "note" if free < LITTLE_DISK_GB else "ok"
        few = "; checkpoints of a 0.5B model take 6 GB each" if free < LITTLE_DISK_GB else ""
        yield Finding(level, what, told + few if writable else f"{printable(str(there))} cannot be written")


def reach() -> Iterator[Finding]:
    """Whether W&B, the hub and the judge answer, and which keys are there."""
    import requests

    services = (
        ("W&B", os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"), "WANDB_API_KEY", "runs are recorded offline"),
        ("hub", os.environ.get("HF_ENDPOINT", "https://huggingface.co"), "HF_TOKEN", "name local directories"),
        ("judge", "https://integrate.api.nvidia.com", "NVIDIA_API_KEY", "name another evaluation.reward"),
    )
    for what, address, key, without in services:
        try:
            requests.head(address, timeout=PROBE_S, allow_redirects=False)
        except requests.RequestException as error:
            yield Finding("note", what, f"{printable(address)} does not answer ({type(error).__name__}): {without}")
        else:
            yield Finding("ok", what, f"answers; {key} is {'set' if os.environ.get(key) else 'not set'}")


def launch(environment: Mapping[str, str], trainer: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether what SLURM or torchrun started is what the trainer's options say.

    Args:
        environment: The process's variables.
        trainer: Options of the configs; those that are not given are the trainer's defaults.
    """
    nodes, devices = trainer.get("num_nodes", 1), trainer.get("devices", "auto")
    if "SLURM_NTASKS" in environment and environment.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        tasks, their_nodes = int(environment["SLURM_NTASKS"]), int(environment.get("SLURM_NNODES", "1"))
        per_node = tasks // their_nodes
        yield from agree("SLURM", "trainer.num_nodes", nodes, their_nodes, "--nodes")
        if isinstance(devices, int):
            yield from agree("SLURM", "trainer.devices", devices, per_node, "--ntasks-per-node")
    elif "TORCHELASTIC_RUN_ID" in environment:
        local = int(environment.get("LOCAL_WORLD_SIZE", "1"))
        their_nodes = int(environment.get("GROUP_WORLD_SIZE", "1"))
        yield from agree("torchrun", "trainer.num_nodes", nodes, their_nodes, "--nnodes")
        if isinstance(devices, int):
            yield from agree("torchrun", "trainer.devices", devices, local, "--nproc-per-node")
    else:
        yield Finding("ok", "launcher", "none: Lightning starts a process a device itself")


def agree(launcher: str, option: str, ours: int, theirs: int, flag: str) -> Iterator[Finding]:
    """An option of the trainer beside the launcher's."""
    if ours == theirs:
        yield Finding("ok", launcher, f"{option} is {ours}, as {flag} says")
    else:
        yield Finding("bad", launcher, f"{option} is {ours}, and {launcher}'s {flag} {theirs}; change one of the two")


def processes(count: int) -> Iterator[Finding]:
    """An all-reduce among so many processes of this machine, on its GPUs where there are as many."""
    import time

    import torch
    from torch.multiprocessing.spawn import spawn

    on_gpus = torch.cuda.device_count() >= count
    backend = "nccl" if on_gpus else "gloo"
    began = time.monotonic()
    try:
        started = spawn(all_reduce, (count, backend, free_port()), nprocs=count, join=False)
        while not started.join(timeout=1.0):
            if time.monotonic() - began > PROCESSES_LIMIT_S:
                for process in started.processes:
                    process.kill()
                yield Finding(
                    "bad", "processes", f"{count} by {backend}: no all-reduce within {PROCESSES_LIMIT_S:.0f} s"
                )
                return
    except Exception as error:  # what a process ended with
        yield Finding("bad", "processes", f"{count} by {backend}: {printable(str(error).strip().splitlines()[-1])}")
        return
    yield Finding(
        "ok", "processes", f"{count} by {backend}: an all-reduce in {time.monotonic() - began:.1f} s, start included"
    )


def all_reduce(rank: int, count: int, backend: str, port: int) -> None:
    """Add up the ranks' numbers, and fail where the sum is wrong."""
    from datetime import timedelta

    import torch
    import torch.distributed

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    store = f"tcp://127.0.0.1:{port}"
    limit = timedelta(seconds=PROCESSES_LIMIT_S)
    torch.distributed.init_process_group(backend, init_method=store, rank=rank, world_size=count, timeout=limit)
    total = torch.tensor([rank + 1.0], device=device)
    torch.distributed.all_reduce(total)
    torch.distributed.destroy_process_group()
    if total.item() != count * (count + 1) / 2:
        raise RuntimeError(f"the sum over {count} processes is {total.item()}")


def free_port() -> int:
    """A port of this machine that nothing listens at."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
