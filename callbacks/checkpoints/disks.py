"""Machines may have a disk each: then one process of every disk writes what its machine is to go on from."""

import secrets
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer

from callbacks.checkpoints.sharded_strategy import ShardedStrategy


def first_on_disk(directory: Path) -> bool:
    """Whether this process is the first of those that see the same directory; all must ask at the same point.

    It is found out by trying: one of those who do not know yet makes a file, and whoever sees it is on its disk.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rank, count = dist.get_rank(), dist.get_world_size()
    unknown = list(range(count))
    first = False
    while unknown:
        name: list[Any] = [f".{secrets.token_hex(8)}.seen"]
        dist.broadcast_object_list(name, src=unknown[0])
        token = directory / name[0]
        if rank == unknown[0]:
            token.touch()
            first = True
        dist.barrier()
        seen: list[Any] = [None] * count
        dist.all_gather_object(seen, token.exists())
        if rank == unknown[0]:
            token.unlink()
        unknown = [other for other in unknown if not seen[other]]
    return first


def write_on_every_disk(trainer: Trainer, directory: Path) -> None:
    """Have checkpoints be written, and removed, on each machine's disk, where it is not one for all."""
    if trainer.num_nodes == 1 or not dist.is_initialized():
        return
    strategy: Any = trainer.strategy
    first = first_on_disk(directory)
    if isinstance(strategy, ShardedStrategy):
        strategy.writes = first
    if not first or trainer.is_global_zero:
        return
    storage = strategy.checkpoint_io
    strategy.remove_checkpoint = storage.remove_checkpoint
    if not isinstance(strategy, ShardedStrategy):
        strategy.save_checkpoint = storage.save_checkpoint
