"""How a run's processes were started: each says what it is, and what does not fit ends all of them with one line.

This is before a row is read or a model loaded, and over a store of its own, as a process group would wait for a process
that never comes for half an hour, and not say which.
"""

import hashlib
import json
import os
import platform
import socket
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from typing_extensions import override

from callbacks.checkpoints.checkpoint_io import saved_step
from callbacks.lightning_internals import before_connecting, cluster_environment
from commands.members import Member, judge, told
from commands.run_record import PACKAGES
from core.errors import ConfigurationError
from datamodules.base import ChatDataModule
from lightning_modules.base import FineTuningModule
from lightning_modules.models.identity import directory_digest

ROOT = Path(__file__).parents[1]
Options = Mapping[str, Any]


def check_surroundings(trainer: Trainer, surroundings: Mapping[str, str] = os.environ) -> None:
    """What SLURM says of the job, against what the trainer was told; each process can see it alone.

    Raises:
        ConfigurationError: If they do not fit.
    """
    tasks = surroundings.get("SLURM_NTASKS")
    environment = cluster_environment(trainer)
    if tasks is None or not isinstance(environment, SLURMEnvironment):
        return
    expected = trainer.num_devices * trainer.num_nodes
    if int(tasks) > 1 and "SLURM_STEP_ID" not in surroundings:
        raise ConfigurationError(
            f"SLURM has {tasks} tasks for this job, and this process is none of them; start it by srun: srun python "
            "cli.py fit ..."
        )
    if int(tasks) != expected:
        raise ConfigurationError(
            f"SLURM runs {tasks} tasks, and trainer.devices {trainer.num_devices} x trainer.num_nodes "
            f"{trainer.num_nodes} are {expected}; one task a device: set --nodes {trainer.num_nodes} and "
            f"--ntasks-per-node {trainer.num_devices}, or the trainer's options"
        )


def meet(trainer: Trainer, options: Options, checkpoint: str | None, *, patience_s: float) -> None:
    """Have the processes compare what they are before they connect; one process has nobody to meet.

    Args:
        trainer: Of the run.
        options: All of them, by dotted name.
        checkpoint: What this process would go on from.
        patience_s: How long to wait for the last one.
    """

    def compare() -> None:
        environment = cluster_environment(trainer)
        if environment is None or trainer.world_size == 1 or dist.is_initialized():
            return
        member = Member(
            host=socket.gethostname(),
            processes=trainer.world_size,
            device=device_name(trainer.strategy.root_device),
            versions={"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            code=code_digest(),
            options=dict(options),
            checkpoint=f"{Path(checkpoint).name} of step {saved_step(Path(checkpoint))}" if checkpoint else "",
        )
        address, port = environment.main_address, environment.main_port
        store = connect(address, port, trainer.global_rank, trainer.world_size, patience_s)
        members = exchange(store, member, trainer.global_rank, trainer.world_size, patience_s)
        rank_zero_info(told(members))
        stores.append(store)

    before_connecting(trainer, compare)


stores: list[Store] = []
"""Kept, as the first process's has the server that the process group connects to."""


def connect(address: str, port: int, rank: int, processes: int, patience_s: float) -> Store:
    """A store that all processes share; the first one, or who launched them, serves it.

    Raises:
        ConfigurationError: If it cannot be served, or reached.
    """
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    first = rank == 0 and not served
    if not first and not answers(address, port, time.monotonic() + patience_s):
        raise ConfigurationError(
            f"process {rank} on {socket.gethostname()} did not reach process 0 at {address}:{port} within "
            f"{patience_s:.0f} s; start one there, and set MASTER_ADDR and MASTER_PORT alike on all machines"
        )
    try:
        store = TCPStore(
            address,
            port,
            processes,
            first,
            timeout=timedelta(seconds=patience_s),
            wait_for_workers=False,
            multi_tenant=not served,
        )
    except dist.DistError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigurationError(
            f"process 0 cannot listen on port {port}: another run on {socket.gethostname()} has it, or another "
            "process that takes itself for the first (NODE_RANK); set MASTER_PORT to another, alike on all machines"
        ) from error
    return PrefixStore("launch", store)


def answers(address: str, port: int, until: float) -> bool:
    """Whether somebody listens there before a moment of ``time.monotonic``."""
    while True:
        try:
            socket.create_connection((address, port), timeout=1.0).close()
        except OSError:  # a name that is not known yet is one too
            if time.monotonic() >= until:
                return False
            time.sleep(0.1)
        else:
            return True


def exchange(store: Store, member: Member, rank: int, processes: int, patience_s: float) -> dict[int, Member]:
    """What every process says of itself; the first one judges for all.

    Raises:
        ConfigurationError: On every process, with the first thing that does not fit.
    """
    until = time.monotonic() + patience_s
    number = store.add(f"came-{rank}", 1)
    store.set(f"{rank}-{number}", json.dumps(member))
    if rank == 0 and number == 1:
        found, doubled = gathered(store, processes, until)
        verdict = judge(found, doubled, processes, patience_s)
        store.set("verdict", json.dumps([verdict, found]))
    try:
        store.wait(["verdict"], timedelta(seconds=max(1.0, until - time.monotonic()) + patience_s / 2))
        verdict, record = json.loads(store.get("verdict"))
    except (dist.DistError, RuntimeError) as error:
        raise ConfigurationError(f"process 0 ended or does not answer; what it printed says why ({error})") from error
    seen = store.add("seen", 1)
    while rank == 0 and number == 1 and seen < sum(came(store, other) for other in range(processes)):
        if time.monotonic() > until + 5:
            break  # or who is late with reading it would find nobody who serves it
        time.sleep(0.01)
        seen = store.add("seen", 0)
    if verdict:
        raise ConfigurationError(verdict)
    return {int(other): Member(*fields) for other, fields in record.items()}


def came(store: Store, rank: int) -> int:
    """How many processes have come that take themselves for this one."""
    return int(store.add(f"came-{rank}", 0))


def gathered(store: Store, processes: int, until: float) -> tuple[dict[int, Member], dict[int, Sequence[Member]]]:
    """Who has come when all have, or the time is over; and who came twice."""
    while not all(came(store, rank) for rank in range(processes)) and time.monotonic() < until:
        time.sleep(0.02)
    found: dict[int, Member] = {}
    doubled: dict[int, Sequence[Member]] = {}
    for rank in range(processes):
        members = [Member(*json.loads(store.get(f"{rank}-{n + 1}"))) for n in range(came(store, rank))]
        if members:
            found[rank] = members[0]
        if len(members) > 1:
            doubled[rank] = members
    return found, doubled


class SameContent(Callback):
    """Compares what the machines of a run have read, before a model is loaded: the rows, and the model's files."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.num_nodes == 1 or not dist.is_initialized():
            return
        own: dict[str, str] = {}
        if trainer.local_rank == 0:
            data = getattr(trainer, "datamodule", None)
            rows = data.digests() if isinstance(data, ChatDataModule) else {}
            own = {f"the rows of {split}": digest for split, digest in rows.items()}
            if isinstance(pl_module, FineTuningModule):
                own["the files of model.model_name"] = directory_digest(pl_module.model_name)
        every: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(every, (socket.gethostname(), own))
        first_host, first = every[0]
        for rank, (host, found) in enumerate(every):
            for name, digest in found.items():
                if digest != first[name]:
                    raise ConfigurationError(
                        f"{name} are others for process {rank} on {host} than for process 0 on {first_host}; give all "
                        "machines the same"
                    )


def device_name(device: torch.device) -> str:
    """A device's kind, and of a GPU what tells it from another one."""
    if device.type != "cuda":
        return device.type
    found = torch.cuda.get_device_properties(device)
    return f"cuda {found.name} ({getattr(found, 'uuid', device.index)})"


def code_digest() -> str:
    """Of the suite's own files."""
    folders = ("callbacks", "commands", "core", "datamodules", "lightning_modules")
    files = [ROOT / "cli.py", *(file for folder in folders for file in sorted((ROOT / folder).rglob("*.py")))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
