"""Exact resume: a run that was stopped anywhere and goes on ends as the one that was not, bit for bit.

Lightning restores weights, optimiser, schedule and counters. What is added here, each because without it a resumed run
differs and says nothing: where in the data the run is, counters that mean the same at whatever hook the checkpoint was
written, whether training was to stop, the log as it was then, and the metrics that monitors and the model card read.
Random numbers need no state, as every batch sets their seeds (``lightning_modules/base.py``).
"""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from callbacks.checkpoints.checkpoint_io import plain_values
from callbacks.evaluation.schedule import reaches_limit
from callbacks.lightning_internals import count_logged_steps, pending_metrics, requeued_from
from callbacks.logging.metrics_file import MetricsFile
from core.errors import ConfigurationError
from datamodules.base import ChatDataModule
from datamodules.position import Position

KEY = "exact_resume"


class ExactResume(Callback):
    """Writes what a resumed run needs into each checkpoint, and puts it in place before training begins.

    Args:
        ckpt_path: The checkpoint that the run goes on from, if it does; SLURM's requeue names its own.
    """

    def __init__(self, ckpt_path: str | None = None) -> None:
        self.ckpt_path = ckpt_path
        self._found: dict[str, Any] = {}
        self._moved: Position | None = None  # where the run is, where another number of processes goes on with it

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the checkpoint, and have the data begin where it ends, before any model is loaded."""
        if stage != "fit":
            return
        path = self.ckpt_path or requeued_from(trainer)
        self._found = plain_values(Path(path), KEY) if path else {"log": {}}
        if not self._found:
            rank_zero_warn(f"{path} does not say where in its data the run was; its epoch begins anew")
        position = Position(*self._found.get("position", ()))
        processes = self._found.get("processes", trainer.world_size)
        if processes != trainer.world_size:
            told = f"{path} is of a run on {processes} processes, this one has {trainer.world_size}"
            if not Path(str(path)).is_dir():
                raise ConfigurationError(
                    f"{told}, whose batches would be others; change trainer.devices or num_nodes back, or train anew "
                    "in another trainer.default_root_dir"
                )
            position = position.on(trainer.world_size, was=processes, multiple=trainer.accumulate_grad_batches)
            self._moved = position
            rank_zero_warn(
                f"{told}: it goes on from the same weights and optimiser state, behind about the same rows of epoch "
                f"{position.epoch}, but with steps of another size, in another order and with other samples"
            )
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, ChatDataModule):
            data.start = position

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Count the epoch's batches as they are on another number of processes."""
        if self._moved is not None:
            counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
            counts.update(dict.fromkeys(counts, self._moved.batches))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have log, metrics and stop as they were: what the stopped run logged after its checkpoint is cut."""
        if self._found.get("should_stop"):
            trainer.should_stop = True
        if trainer.is_global_zero and self._found and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            for record in records(trainer):
                record.cut(self._found["log"])
                for step, metrics in self._found.get("pending", ()):
                    record.log_metrics(metrics, step)
        if metrics := self._found.get("metrics"):
            trainer.num_sanity_val_steps = 0  # which would reset them, and was done when the run began
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        count_logged_steps(trainer)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        pending = pending_metrics(trainer)
        checkpoint[KEY] = {
            "position": list(settle(checkpoint["loops"]["fit_loop"])),
            "processes": trainer.world_size,
            "should_stop": judged_enough(trainer),
            "log": {name: size for record in records(trainer) for name, size in record.sizes().items()},
            "pending": [pending] if pending is not None else [],
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        }


def judged_enough(trainer: Trainer) -> bool:
    """Whether training is to stop by a judgement, as early stopping's; a limit that it came to may be raised."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    left_s = [timer.time_remaining() for timer in timers]
    out_of_time = any(seconds is not None and seconds <= 0 for seconds in left_s)
    return trainer.should_stop and not reaches_limit(trainer) and not out_of_time


def records(trainer: Trainer) -> list[MetricsFile]:
    """The run's own logs."""
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsFile)]


def settle(loops: dict[str, Any]) -> Position:
    """Make the saved counters say what has been done, whatever hook saved them, and tell where in the data that is.

    Lightning guesses from half-advanced counters where it was; saved after a batch they say that the batch has not
    ended, saved after an epoch that the epoch has not. Within an epoch all batches begun are done. At its end the next
    epoch has not begun.

    Args:
        loops: The fit loop's state; changed in place.
    """
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    ended = epochs["current"]["processed"] == epochs["current"]["started"]
    for counts in (epochs["total"], epochs["current"]) if ended else ():
        counts["completed"] = counts["processed"]
    for counts in (batches["total"], batches["current"]):
        counts["completed"] = counts["processed"]
    if ended:
        batches["current"].update(ready=0, started=0, processed=0, completed=0)
        batches["is_last_batch"] = False
        validation = loops["epoch_loop.val_loop.batch_progress"]
        for counts in (validation["total"], validation["current"]):
            counts.update(ready=0, started=0, processed=0, completed=0)
    return Position(epochs["current"]["processed"], batches["current"]["processed"])
