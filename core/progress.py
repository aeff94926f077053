"""What shows a run's progress, that of work beside training too, as sampling and asking."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from typing_extensions import override


class Quiet:
    """Is told how much of some work is done, and shows nothing."""

    def update(self, count: int) -> None:
        """So much more is done."""


class Display(ProgressBar):
    """Base of the suite's own; Lightning switches it off on all processes but the first."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True

    @override
    def disable(self) -> None:
        self.enabled = False

    @override
    def enable(self) -> None:
        self.enabled = True

    def bar(self, title: str, total: int, *, after_s: float = 0.0) -> AbstractContextManager[Any]:
        """Show some work of so many parts while it is under way; gives what is told by ``update(count)``.

        What is over within ``after_s`` is not shown.
        """
        raise NotImplementedError


def bar(trainer: Trainer | None, title: str, total: int, *, after_s: float = 0.0) -> AbstractContextManager[Any]:
    """A bar in the run's own display, where it has one that is on."""
    display = None if trainer is None else trainer.progress_bar_callback
    if isinstance(display, Display) and display.enabled:
        return display.bar(title, total, after_s=after_s)
    return nullcontext(Quiet())
