"""Progress in a terminal: one display for training, validation, sampling and asking, and lines that stay above it."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from typing_extensions import override

from callbacks.logging.line_progress import epochs, figures, standing
from core.progress import Display, Quiet

WIDTH = 16
"""Of a bar, in columns; the rest is for words and figures."""


class TerminalProgress(Display):
    """Bars at the foot of the terminal while there is something to wait for; what is printed meanwhile goes above.

    An epoch is counted from 1, and leaves a line with its figures when it has been validated.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live: Progress | None = None
        self._epoch: TaskID | None = None
        self._validation: TaskID | None = None

    def start(self) -> Progress:
        """The display, on the screen."""
        if self._live is None:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=WIDTH),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[figures]}"),
                transient=True,
            )
            self._live.start()
        return self._live

    def stop(self) -> None:
        """Leave the terminal as it is found by whoever prints next."""
        if self._live is not None:
            self._live.stop()
        self._live = self._epoch = self._validation = None

    @override
    @contextmanager
    def bar(self, title: str, total: int, *, after_s: float = 0.0) -> Iterator[Any]:
        """A bar of some other work, while it is under way."""
        alone = self._live is None
        live = self.start()
        task = live.add_task(title, total=total, figures="", visible=not after_s)
        try:
            yield Part(live, task, after_s)
        finally:
            live.remove_task(task)
            if alone:
                self.stop()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled:
            return
        live = self.start()
        if self._epoch is not None:
            live.remove_task(self._epoch)
        self._epoch = live.add_task(epochs(trainer), total=known(trainer.num_training_batches), figures="")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._live is not None and self._epoch is not None:
            shown = figures(self.get_metrics(trainer, pl_module))
            self._live.update(self._epoch, completed=batch_idx + 1, figures=shown)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled:
            total = sum(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)
            title = "trying out" if trainer.sanity_checking else "validation"
            self._validation = self.start().add_task(title, total=known(total), figures="")

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._live is not None and self._validation is not None:
            self._live.advance(self._validation)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._live is not None and self._validation is not None:
            self._live.remove_task(self._validation)
        self._validation = None
        if not self.enabled or trainer.sanity_checking:
            return
        if line := standing(trainer, self.get_metrics(trainer, pl_module)):
            self.start().console.print(line, highlight=False, markup=False)
        if trainer.state.fn != "fit":
            self.stop()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.stop()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.stop()


class Part(Quiet):
    """What tells a display of some work's progress."""

    def __init__(self, live: Progress, task: TaskID, after_s: float) -> None:
        self.live = live
        self.task = task
        self.shown_from = time.monotonic() + after_s

    @override
    def update(self, count: int) -> None:
        self.live.update(self.task, advance=count, visible=time.monotonic() >= self.shown_from)


def known(total: float) -> float | None:
    """A number of batches; None for rows that do not say how many they are."""
    return total if math.isfinite(total) else None
