"""What a reference says of preference pairs, computed once and kept on disk under the content that it depends on."""

import copy
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from core.files import OWN
from datamodules.batches import PreferenceBatch
from datamodules.position import ResumableSampler

PairTable = dict[str, tuple[float, float]]
"""The log-probabilities of the chosen and of the rejected completion, by the pair's key."""


def pair_keys(batch: PreferenceBatch) -> list[str]:
    """A digest of each pair's tokens and masks, whatever the padding and the pairs beside it."""
    tokens = batch.tokens
    digests = []
    for ids, attended, completion in zip(*(tensor.cpu() for tensor in tokens), strict=True):
        row = torch.stack([ids[attended], completion[attended].to(ids.dtype)])
        digests.append(hashlib.blake2b(row.contiguous().numpy().tobytes(), digest_size=16).hexdigest())
    pairs = len(digests) // 2
    return [chosen + rejected for chosen, rejected in zip(digests[:pairs], digests[pairs:], strict=True)]


def read_table(file: Path) -> PairTable:
    """What a file holds: a pair a line, without lines that a kill or a full disk broke off."""
    table: PairTable = {}
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return table
    for line in lines:
        try:
            key, chosen, rejected = json.loads(line)
            values = float(chosen), float(rejected)
        except (ValueError, TypeError, RecursionError, OverflowError):
            continue
        if all(map(math.isfinite, values)):
            table[str(key)] = values
    return table


class TableFile:
    """Appends pairs to a table as they become known, so that a run that is ended goes on from them.

    Several processes and runs may append at once: every addition is one write. A full or read-only disk costs a
    warning.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writes = True

    def add(self, pairs: Mapping[str, tuple[float, float]]) -> None:
        """Append pairs, behind a line break as the line before may have been broken off."""
        if not self._writes or not pairs:
            return
        lines = (json.dumps([key, *values]) for key, values in pairs.items())
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, flags, OWN)
            try:
                os.write(descriptor, ("\n" + "\n".join(lines) + "\n").encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            self._writes = False
            rank_zero_warn(f"the reference's log-probabilities are not kept for another run: {error}")


def merged_over_processes(table: PairTable) -> PairTable:
    """The tables of all processes together."""
    if not torch.distributed.is_initialized():
        return table
    tables: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(tables, table)
    return {key: values for part in tables for key, values in part.items()}


def ask_about_run(trainer: Trainer, log_probs: Callable[[PreferenceBatch], Tensor], path: Path) -> PairTable:
    """A table of every pair that the run will see, from the file as far as it has them; the file then has all.

    Args:
        trainer: About to train. Each process asks about the pairs of its own batches, and all get to know all.
        log_probs: What the reference gives to a batch's completions, all chosen first.
        path: Where the table is kept, batch by batch.
    """
    table, file = read_table(path), TableFile(path)
    cached = len(table)
    device = trainer.strategy.root_device
    for batch in _batches_of_run(trainer):
        keys = pair_keys(batch)
        if everywhere(trainer, all(key in table for key in keys)):
            continue
        here = PreferenceBatch(batch.tokens.to(device))
        with trainer.precision_plugin.train_step_context():
            chosen, rejected = log_probs(here).chunk(2)
        found = dict(zip(keys, zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True))
        file.add(found)
        table.update(found)
    table = merged_over_processes(table)
    rank_zero_info(f"reference log-probabilities: {len(table) - cached} pairs computed, {cached} read from {path}")
    return table


def everywhere(trainer: Trainer, known: bool) -> bool:
    """Whether a batch's pairs are known; of a sharded reference, on all processes, as none can ask it alone."""
    if getattr(trainer.strategy, "sharding", None) is None:
        return known
    return bool(trainer.strategy.reduce_boolean_decision(known, all=True))


def _batches_of_run(trainer: Trainer) -> Iterator[PreferenceBatch]:
    """Every training batch; where the run ends within its first epoch, those that it will come to.

    A run that is resumed asks about the same batches, as its numbers depend in their last bits on what stands beside.
    Where epochs are shorter than the data, so that each sees other pairs, none: they are asked about as they come.
    """
    loader: Any = copy.copy(trainer.train_dataloader)
    if hasattr(loader, "_iterator"):
        loader._iterator = None  # workers that persist share one iterator, which training has begun
    planned = int(trainer.estimated_stepping_batches) * trainer.accumulate_grad_batches
    of_epoch = int(trainer.num_training_batches)
    within = planned <= of_epoch or trainer.max_epochs == 1
    if not within and of_epoch != len(loader):
        return
    whole = isinstance(loader.sampler, ResumableSampler)
    with loader.sampler.from_the_beginning() if whole else nullcontext():
        yield from itertools.islice(loader, min(planned, of_epoch) if within else None)


def look_up(table: PairTable, batch: PreferenceBatch) -> Tensor | None:
    """Log-probabilities of a batch's completions, all chosen first; None where the table lacks a pair."""
    found = [table.get(key) for key in pair_keys(batch)]
    pairs = [values for values in found if values is not None]
    return torch.tensor(pairs).T.flatten() if len(pairs) == len(found) else None
