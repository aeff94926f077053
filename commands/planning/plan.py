"""The plan of a configuration: its largest batch, its memory, its work."""

from typing import Any, NamedTuple

import torch

from callbacks.checkpoints.sharded_strategy import ShardedStrategy
from commands.lightning import SuiteCLI
from commands.planning.batch import Largest, largest_batch
from commands.planning.memory import Account, Moment, Run
from commands.planning.work import Work, work


class Plan(NamedTuple):
    """A run's figures."""

    account: Account
    moments: list[Moment]
    batch: Largest
    work: Work
    processes: int


def planned(settings: SuiteCLI, device: str, **changes: Any) -> Plan:
    """The plan of a configuration, with some options of the model or the data changed."""
    module, data = settings.model, settings.data()
    trainer = settings.option("trainer")
    module.check_options(data)
    for name, value in changes.items():
        setattr(data if name == "batch_size" else module, name, value)
    batch = largest_batch(data, module)
    count = processes(settings, device)
    run = Run(
        module=module,
        batch=batch,
        precision=str(trainer.precision or "32-true"),
        device=device,
        accumulates=trainer.accumulate_grad_batches > 1,
        distributed=count > 1,
        evaluation=settings.evaluation(),
        shards=shards(trainer.strategy, count),
    )
    account = Account(run)
    done = work(data, module, trainer, settings.evaluation(), batch, count)
    return Plan(account, account.moments(), batch, done, count)


def device_of(settings: SuiteCLI, *, planned_for: float | None = None) -> str:
    """Where the run is going to be, on the machine at hand or on a GPU of so much memory."""
    accelerator = settings.option("trainer.accelerator")
    there = planned_for is not None or torch.cuda.is_available()
    return "cuda" if accelerator in ("gpu", "cuda") or (accelerator != "cpu" and there) else "cpu"


def shards(strategy: Any, processes: int) -> int:
    """How many processes share a copy of the weights."""
    if not str(getattr(strategy, "class_path", "")).endswith(f".{ShardedStrategy.__name__}"):
        return 1
    size = strategy.init_args.data_parallel_size
    return processes if size == "auto" else int(size)


def processes(settings: SuiteCLI, device: str) -> int:
    """How many processes the run has on all machines."""
    devices = settings.option("trainer.devices")
    nodes = int(settings.option("trainer.num_nodes"))
    if isinstance(devices, (list, tuple)):
        return nodes * len(devices)
    count = str(devices)
    if count in ("auto", "-1"):
        return nodes * (max(1, torch.cuda.device_count()) if device == "cuda" else 1)
    return nodes * (int(count) if count.isdigit() else len(count.split(",")))
