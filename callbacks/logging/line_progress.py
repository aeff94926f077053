"""Progress as lines, for logs that are no terminal."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from core.progress import Display, Quiet


class LineProgress(Display):
    """Prints a line at most every few seconds: where training stands, its metrics, and the time left.

    Args:
        every_s: Least seconds between two lines.
    """

    def __init__(self, every_s: float = 10.0) -> None:
        super().__init__()
        self.every_s = every_s
        self._started: float | None = None
        self._printed = 0.0
        self._first_step = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._printed = time.monotonic()
        self._started = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._started is None:  # what comes before, as asking the reference, says nothing of the steps
            self._started, self._first_step = time.monotonic(), trainer.global_step
        if time.monotonic() - self._printed >= self.every_s:
            self._line(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._line(trainer, pl_module)

    @override
    @contextmanager
    def bar(self, title: str, total: int, *, after_s: float = 0.0) -> Iterator[Any]:
        """Lines of some other work, at most every few seconds while it is under way."""
        yield Lines(title, total, max(self.every_s, after_s))

    def _line(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._printed = time.monotonic()
        if not self.enabled:
            return
        if line := standing(trainer, self.get_metrics(trainer, pl_module)):
            left = ""
            if trainer.state.fn == "fit" and self._started is not None:
                total, done = int(trainer.estimated_stepping_batches), trainer.global_step
                pace = (done - self._first_step) / max(1e-9, self._printed - self._started)
                left = f"  {(total - done) / pace:.0f} s left" if pace and done < total else ""
            print(line + left, flush=True)


class Lines(Quiet):
    """Prints how far some work has come, at most every few seconds."""

    def __init__(self, title: str, total: int, every_s: float) -> None:
        self.title = title
        self.total = total
        self.every_s = every_s
        self.done = 0
        self._printed = time.monotonic()

    @override
    def update(self, count: int) -> None:
        self.done += count
        if time.monotonic() - self._printed >= self.every_s:
            self._printed = time.monotonic()
            print(f"{self.title}  {self.done}/{self.total}", flush=True)


def epochs(trainer: Trainer) -> str:
    """Which epoch this is, counted from 1, and of how many."""
    last = trainer.max_epochs
    return f"epoch {trainer.current_epoch + 1}" + (f" of {last}" if last and last > 0 else "")


def standing(trainer: Trainer, metrics: Mapping[str, Any]) -> str:
    """Where training stands, and the metrics; of a validation alone its metrics, if there are any."""
    shown = figures(metrics)
    if trainer.state.fn != "fit":
        return f"validation  {shown}" if shown else ""
    return f"{epochs(trainer)}  step {trainer.global_step}/{int(trainer.estimated_stepping_batches)}  {shown}"


def figures(metrics: Mapping[str, Any]) -> str:
    """Metrics for people, without the number that Lightning gives a run."""
    named = ((name.removeprefix("train/"), value) for name, value in metrics.items() if name != "v_num")
    return "  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in named)
