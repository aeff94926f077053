"""When an evaluation is due, where a run ends, what an evaluation is about and where its files go."""

import math
from pathlib import Path

from lightning.pytorch import Trainer

from callbacks.lightning_internals import may_stop_early
from lightning_modules.base import FineTuningModule


def is_due(trainer: Trainer, *, every_n_epochs: int) -> bool:
    """Whether this is a validation on its own, the last of the run, or of an epoch that is to be evaluated."""
    if trainer.state.fn != "fit" or ends_here(trainer):
        return True
    later_check = batches_left(trainer) >= (trainer.val_check_batch or 1) or ends_later_in_epoch(trainer)
    return not later_check and (trainer.current_epoch + 1) % every_n_epochs == 0


def folder(trainer: Trainer, *, epoch: int) -> Path:
    """``eval/epoch=N`` of a fit, ``eval/final`` of a model, ``eval/<name>`` of a checkpoint."""
    name = f"epoch={epoch}" if trainer.state.fn == "fit" else "final"
    if trainer.state.fn != "fit" and trainer.ckpt_path is not None:
        name = Path(trainer.ckpt_path).stem
    return Path(trainer.default_root_dir) / "eval" / name


def judged(trainer: Trainer, module: FineTuningModule) -> str:
    """What an evaluation is about: a model, it under a checkpoint, or what it has become in training."""
    if trainer.state.fn == "fit":
        return f"{module.model_name} after {trainer.global_step} steps of {module.method}"
    return module.model_name if trainer.ckpt_path is None else f"{module.model_name} under {trainer.ckpt_path}"


def ends_here(trainer: Trainer) -> bool:
    """Whether the step just taken is the last: by ``max_steps``, ``max_epochs``, ``max_time`` or early stopping."""
    return (trainer.should_stop and may_stop_early(trainer)) or reaches_limit(trainer)


def reaches_limit(trainer: Trainer) -> bool:
    """Whether the step just taken is the last by ``max_steps`` or ``max_epochs``."""
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
