"""Batches of a token budget in the place of a number of rows, alike on every process."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import torch
from typing_extensions import override

from datamodules.position import BEGINNING, Position, ResumableSampler


class TokenBudgetSampler(ResumableSampler):
    """Yields lists of rows whose tokens fit a budget; a ``DataLoader`` takes it with ``batch_size=None``.

    The rows are packed once, so that every epoch has the same number of batches; their order is another each epoch.
    Every process has the same number, for which some are split.

    Args:
        lengths: Tokens of each row; one above the budget has a batch of its own.
        world_size: Processes.
        rank: Of this process.
        budget: Most tokens of a batch.
        seed: Of the packing, in which rows meet at random, and of the orders.
        start: Where the first epoch begins.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        world_size: int,
        rank: int,
        *,
        budget: int,
        seed: int,
        start: Position = BEGINNING,
    ) -> None:
        super().__init__(range(len(lengths)), world_size, rank, seed=seed, start=start)
        batches = best_fit(lengths, self._order(len(lengths), seed), budget=budget)
        self.batches = split_to_multiple(batches, world_size)

    @override
    def in_order(self) -> Iterator[list[int]]:
        order = self._order(len(self.batches), self.seed + self.epoch)
        return (self.batches[i] for i in order[self.rank :: self.num_replicas])

    @override
    def __len__(self) -> int:
        return len(self.batches) // self.num_replicas

    @staticmethod
    def _order(count: int, seed: int) -> Sequence[int]:
        order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        return order


def best_fit(lengths: Sequence[int], order: Sequence[int], *, budget: int) -> list[list[int]]:
    """Put each row into the batch that it leaves the least room in, and into a new one where it fits in none."""
    batches: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # what is left of each open batch, in rising order, and which one it is
    for row in order:
        at = bisect_left(rooms, (lengths[row], -1))
        if at < len(rooms):
            room, batch = rooms.pop(at)
        else:
            room, batch = budget, len(batches)
            batches.append([])
        batches[batch].append(row)
        if room > lengths[row]:
            insort(rooms, (room - lengths[row], batch))
    return batches


def split_to_multiple(batches: Sequence[list[int]], multiple: int) -> list[list[int]]:
    """Halve the batches of most rows until their number is a multiple; where all have one row, repeat some."""
    return to_number(batches, -(-len(batches) // multiple) * multiple)


def to_number(batches: Sequence[list[int]], number: int) -> list[list[int]]:
    """Halve the batches of most rows until there are so many, or join those of the fewest; no row is lost."""
    result = list(batches)
    while len(result) > number:
        last, smallest = (result.pop(min(range(len(result)), key=lambda i: len(result[i]))) for _ in range(2))
        result.append(last + smallest)
    while len(result) < number:
        largest = max(range(len(result)), key=lambda i: len(result[i]))
        rows = result[largest]
        middle = len(rows) // 2
        result[largest] = rows[middle:]
        result.append(rows[:middle] or rows)
    return result
