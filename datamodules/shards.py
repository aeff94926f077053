"""Which rows of a validation a process has: each row counts on one process, and all have equally many batches."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DistributedSampler
from typing_extensions import override


class ShardSampler(DistributedSampler[Any]):
    """Every so many-th item, in order; a process with a batch less than others repeats the first item, to keep step.

    Args:
        items: Rows, or batches of them.
        world_size: Processes.
        rank: Of this process.
        items_per_batch: How many items a batch takes.
    """

    def __init__(self, items: Sequence[Any], world_size: int, rank: int, *, items_per_batch: int = 1) -> None:
        super().__init__(items, world_size, rank, shuffle=False)  # type: ignore[arg-type]
        own = list(items[rank::world_size])
        self.counted = -(-len(own) // items_per_batch)
        """How many batches are of this process's own items; what is in a later one counts elsewhere."""
        most = -(-len(items[::world_size]) // items_per_batch)
        self.items = [*own, *items[:1]] if self.counted < most else own

    @override
    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    @override
    def __len__(self) -> int:
        return len(self.items)
