"""Which rows of a validation a process has: each row is on one process, so that none counts twice."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DistributedSampler
from typing_extensions import override


class ShardSampler(DistributedSampler[Any]):
    """Every so many-th item, in order; a process that would have none repeats the first, so that it keeps step.

    Args:
        items: Rows, or batches of them.
        world_size: Processes.
        rank: Of this process.
    """

    def __init__(self, items: Sequence[Any], world_size: int, rank: int) -> None:
        super().__init__(items, world_size, rank, shuffle=False)  # type: ignore[arg-type]
        self.repeats = rank >= len(items)
        """Whether what is here is another process's, and must not count."""
        self.items = items[:1] if self.repeats else items[rank::world_size]

    @override
    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    @override
    def __len__(self) -> int:
        return len(self.items)
