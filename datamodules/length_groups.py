"""Batches of rows of about the same length, for models that need padding."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from typing_extensions import override

from datamodules.position import ResumableSampler

WINDOW = 50
"""Batches of every process among whose rows like lengths are sought: enough to waste little, and still at random."""


class LengthGroupedSampler(ResumableSampler):
    """Rows in an order in which those of a batch are about as long, and batches come at random.

    The order of an epoch is cut into windows; a window's rows are sorted by length and cut into batches, and all
    batches are shuffled. Rows that fill no batch on every process come last.

    Args:
        lengths: Tokens of each row.
        world_size: Processes.
        rank: Of this process.
        rows_per_batch: Rows of a batch.
        options: Of :class:`ResumableSampler`.
    """

    def __init__(
        self, lengths: Sequence[int], world_size: int, rank: int, *, rows_per_batch: int, **options: Any
    ) -> None:
        super().__init__(range(len(lengths)), world_size, rank, rows_per_batch=rows_per_batch, **options)
        self.lengths = lengths

    @override
    def in_order(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order: list[int] = torch.randperm(len(self.lengths), generator=generator).tolist()
        order += order[: self.total_size - len(order)]
        size, step = self.rows_per_batch, self.rows_per_batch * self.num_replicas
        whole = len(order) // step * step
        batches: list[list[int]] = []
        for first in range(0, whole, WINDOW * step):
            window = sorted(order[first : min(first + WINDOW * step, whole)], key=self.lengths.__getitem__)
            batches += [window[at : at + size] for at in range(0, len(window), size)]
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        for number in shuffled[self.rank :: self.num_replicas]:
            yield from batches[number]
        yield from order[whole:][self.rank :: self.num_replicas]
