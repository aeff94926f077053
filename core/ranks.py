"""Work that every process has a share of: done by each, gathered by all, and a failure of one told to all."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch.distributed as dist

from core.errors import ProcessError

Share = TypeVar("Share")


class Ranks(Generic[Share]):
    """The processes of a run.

    They wait for each other over a group of its own, as one may have to wait for a slow reward source for longer
    than the training's process group would, and without an accelerator's, whose waits end with the process.

    Args:
        patience_s: How long to wait for the slowest, in seconds.
    """

    def __init__(self, patience_s: float) -> None:
        self.rank, self.count = 0, 1
        self._group: Any = None
        if dist.is_available() and dist.is_initialized():
            self.rank, self.count = dist.get_rank(), dist.get_world_size()
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=patience_s))

    def gather(self, work: Callable[[], Share]) -> list[Share]:
        """What the work gives on every process, in their order.

        Raises:
            Exception: On the process where the work failed what it raised; on the others a ProcessError that says so.
        """
        share, error = None, None
        try:
            share = work()
        except Exception as raised:
            error = raised
        told = None if error is None else f"{type(error).__name__}: {error}"
        parts: list[Any] = [(share, told)]
        if self._group is not None:
            parts = [None] * self.count
            dist.all_gather_object(parts, (share, told), group=self._group)
        if error is not None:
            raise error
        for rank, (_, failure) in enumerate(parts):
            if failure is not None:
                raise ProcessError(f"process {rank} failed: {failure}")
        return [part for part, _ in parts]

    def own(self, work: Callable[[], Share]) -> Share:
        """What the work gives on this process, once it has succeeded on every one; raises as :meth:`gather` does."""
        made: list[Share] = []
        self.gather(lambda: made.append(work()))  # type: ignore[arg-type, func-returns-value, return-value]
        return made[0]
