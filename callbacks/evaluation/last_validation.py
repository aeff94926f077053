"""Where a run ends, so that its last validation is known for what it is."""

import math

from lightning.pytorch import Trainer

from callbacks.lightning_internals import may_stop_early


def ends_here(trainer: Trainer) -> bool:
    """Whether the step just taken is the last: by ``max_steps``, ``max_epochs``, ``max_time`` or early stopping."""
    if trainer.should_stop and may_stop_early(trainer):
        return True
    in_last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs
    at_last_batch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    return _steps_left(trainer) <= 0 or (in_last_epoch and at_last_batch)


def ends_later_in_epoch(trainer: Trainer) -> bool:
    """Whether the run is to end within this epoch, after more batches."""
    left = batches_left(trainer)
    in_last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs
    return left > 0 and (in_last_epoch or _steps_left(trainer) <= math.ceil(left / trainer.accumulate_grad_batches))


def batches_left(trainer: Trainer) -> int | float:
    """Training batches of this epoch that are still to come."""
    return trainer.num_training_batches - trainer.fit_loop.batch_idx - 1


def _steps_left(trainer: Trainer) -> int | float:
    return math.inf if trainer.max_steps == -1 else trainer.max_steps - trainer.global_step
