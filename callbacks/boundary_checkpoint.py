"""ModelCheckpoint that saves at the boundary of an optimiser step alone, as accumulated gradients are in no file."""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override


class BoundaryCheckpoint(ModelCheckpoint):
    """Saves only between optimiser steps, and validates there too, so the weights judged are the weights saved."""

    _due = False
    """Whether a validation ended within a window of accumulation, so its save waits for the window's end."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        window, interval = trainer.accumulate_grad_batches, trainer.val_check_batch
        if interval is not None and window <= interval < trainer.num_training_batches:
            trainer.val_check_batch = interval // window * window

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._due = not trainer.sanity_checking and not at_step_boundary(trainer)
        if not self._due:
            super().on_validation_end(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not at_step_boundary(trainer):
            return
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._due:
            self.on_validation_end(trainer, pl_module)

    @staticmethod
    @override
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        """Point ``last.ckpt`` at a checkpoint without a moment at which it points nowhere."""
        if trainer.is_global_zero and Path(filepath).resolve() != Path(linkpath).resolve():
            partial = f"{linkpath}.link.partial"
            Path(partial).unlink(missing_ok=True)
            os.symlink(os.path.relpath(filepath, Path(linkpath).parent), partial)
            os.replace(partial, linkpath)
        trainer.strategy.barrier()


def at_step_boundary(trainer: Trainer) -> bool:
    """Whether no gradient is accumulated that the next optimiser step would need."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()
