"""Bars of work that is not training, as sampling and asking: where a run's progress is shown, whatever shows it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Trainer
from typing_extensions import override


@runtime_checkable
class Bar(Protocol):
    """Is told how much has been done."""

    def update(self, count: int) -> None:
        """So much more is done."""


@runtime_checkable
class Display(Protocol):
    """What shows a run's progress."""

    def bar(self, title: str, total: int) -> AbstractContextManager[Bar]:
        """Show some work of so many parts while it is under way."""


class NoBar(Bar):
    """Shows nothing."""

    @override
    def update(self, count: int) -> None:
        pass


def bar(trainer: Trainer, title: str, total: int) -> AbstractContextManager[Any]:
    """A bar on the first process, in the run's own display."""
    display = trainer.progress_bar_callback
    shown = isinstance(display, Display) and trainer.is_global_zero
    return display.bar(title, total) if shown else nullcontext(NoBar())  # type: ignore[union-attr]
