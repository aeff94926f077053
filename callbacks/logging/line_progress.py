"""Progress as lines, for logs that are no terminal."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from typing_extensions import override


class LineProgress(ProgressBar):
    """Prints a line at most every few seconds: where training stands, its metrics, and the time left.

    Args:
        every_s: Least seconds between two lines.
    """

    def __init__(self, every_s: float = 10.0) -> None:
        super().__init__()
        self.every_s = every_s
        self._enabled = True
        self._started = 0.0
        self._printed = 0.0
        self._first_step = 0

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = self._printed = time.monotonic()
        self._first_step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() - self._printed >= self.every_s:
            self._line(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._line(trainer, pl_module)

    def _line(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._printed = time.monotonic()
        if not self._enabled:
            return
        metrics = self.get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        shown = "  ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in metrics.items()
        )
        if trainer.state.fn == "fit":
            total, done = int(trainer.estimated_stepping_batches), trainer.global_step
            pace = (done - self._first_step) / max(1e-9, self._printed - self._started)
            left = f"  {(total - done) / pace:.0f} s left" if pace and done < total else ""
            print(f"epoch {trainer.current_epoch}  step {done}/{total}  {shown}{left}", flush=True)
        elif shown:
            print(f"validation  {shown}", flush=True)
