"""Where in its data a run is, so that one that is resumed sees the rows that are still to come, and no row twice."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

from torch.utils.data import DistributedSampler
from typing_extensions import override


class Position(NamedTuple):
    """How far a process has come: in epoch ``epoch``, behind so many of its batches."""

    epoch: int = 0
    batches: int = 0

    def on(self, processes: int, *, was: int, multiple: int) -> "Position":
        """About the same place where there are other processes, and so another number of batches on each.

        Args:
            processes: How many there are.
            was: How many there were.
            multiple: What the number of batches must be a multiple of; rounded down, so that no row is left out.
        """
        return Position(self.epoch, self.batches * was // processes // multiple * multiple)


BEGINNING = Position()


class ResumableSampler(DistributedSampler[Any]):
    """Rows in an order that epoch and seed decide; one epoch begins where a stopped run had come to.

    The skipped rows are never loaded. The epoch is known from the start, as Lightning makes its first iterator before
    it says which epoch it is.

    Args:
        options: Of DistributedSampler.
        start: Where to begin.
        rows_per_batch: Indices that a batch takes.
    """

    def __init__(self, *options: Any, start: Position = BEGINNING, rows_per_batch: int = 1, **named: Any) -> None:
        super().__init__(*options, **named)
        self.start = start
        self.rows_per_batch = rows_per_batch
        self.epoch = start.epoch

    @override
    def __iter__(self) -> Iterator[Any]:
        skipped = self.start.batches * self.rows_per_batch if self.epoch == self.start.epoch else 0
        return islice(self.in_order(), skipped, None)

    @contextmanager
    def from_the_beginning(self) -> Iterator[None]:
        """Have an iteration meanwhile see all of the first epoch, as before any stop."""
        start, epoch = self.start, self.epoch
        self.start, self.epoch = BEGINNING, 0
        try:
            yield
        finally:
            self.start, self.epoch = start, epoch

    def in_order(self) -> Iterator[Any]:
        """All of this process's indices of the epoch."""
        return super().__iter__()
