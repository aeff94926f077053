"""SIGTERM, SIGUSR1 and Ctrl-C: save at a step boundary, end with 143 or 130, resume with ``--ckpt_path last``."""

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from callbacks.lightning_internals import (
    SignalConnector,
    at_step_boundary,
    cluster_environment,
    install_signals,
    log_step,
    save_and_requeue,
    signals_of,
    validation_follows,
)

EXIT_CODE = 143
"""128 + SIGTERM, which schedulers take for a job that was asked to end."""
INTERRUPTED = 130
"""128 + SIGINT, which shells take for a command that Ctrl-C ended."""


class Preempted(SystemExit):
    """Ends the process as one that a signal ended."""


class Signals(SignalConnector):
    """In place of Lightning's handlers, which exit 0 on one process and wait for each other on several."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.received = 0
        self.at_once = False
        """Whether the user would not wait for the save."""
        self.stepping = False
        """Whether a training step has begun, so that there is something to save."""

    @override
    def register_signal_handlers(self) -> None:
        handled = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, requeue_signal(self.trainer) or signal.SIGTERM}
        # A shell has its background jobs ignore the Ctrl-C that is meant for others.
        handled = {signum for signum in handled if signal.getsignal(signum) != signal.SIG_IGN}
        self._original_handlers = {signum: signal.getsignal(signum) for signum in handled}
        for signum in handled:
            self._register_signal(signum, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        """In a fit of several processes, and in every training step, only note it; else end there and then.

        Before the first step, as in DPO's pass of the reference, every process ends by itself: what is computed there
        is kept batch by batch. A second Ctrl-C ends in any case, and nothing is saved.
        """
        first = not self.received
        self.received = signum
        fits = self.trainer.state.fn == TrainerFn.FITTING
        self.at_once = not first and signum == signal.SIGINT
        prepares = not self.stepping and not self.trainer.validating
        alone = self.trainer.world_size == 1 and not self.trainer.training
        ends = self.at_once or (first and (not fits or prepares or alone))
        if signum == signal.SIGINT and self.trainer.is_global_zero:
            told = "interrupted" if ends else "interrupted: saving after this step; Ctrl-C again ends at once, without"
            os.write(2, f"\n{told}\n".encode())  # a print may be under way in what is interrupted
        if ends:
            raise Preempted(exit_code(signum))


class Preemption(Callback):
    """Saves ``last.ckpt`` and ends the run once any process has been asked to end.

    The processes agree after every optimiser step, so none waits for another that has left. On one process a
    validation is left at once and made up for on resuming; on several it is finished, and one more step taken. Under
    SLURM's auto-requeue Lightning saves its own checkpoint and requeues the job, at the same boundary.
    """

    def __init__(self) -> None:
        self._in_validation = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(signals_of(trainer), Signals):
            install_signals(trainer, Signals(trainer))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if signum := asked(trainer):
            raise leave(trainer, signum)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        signals_of(trainer).stepping = True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if at_step_boundary(trainer) and not validation_follows(trainer):
            signum = asked(trainer)
            if signum:
                self._save(trainer, signum)
                log_step(trainer)
                raise leave(trainer, signum)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and (signum := asked(trainer)):
            raise leave(trainer, signum)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save where a validation within a fit was left."""
        in_fit = trainer.state.fn == TrainerFn.FITTING and trainer.validating
        signals = signals_of(trainer)
        if isinstance(exception, Preempted) and in_fit and at_step_boundary(trainer) and not signals.at_once:
            self._in_validation = True
            self._save(trainer, signals.received)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._in_validation:  # so that resuming begins with the validation, from its first batch
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            for counts in (progress["total"], progress["current"]):
                counts.update(ready=1, started=1, processed=0, completed=0)

    def _save(self, trainer: Trainer, signum: int) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return
        if signum == requeue_signal(trainer):
            save_and_requeue(trainer, signum)
            return
        directory = getattr(trainer.checkpoint_callback, "dirpath", None)
        path = Path(directory or Path(trainer.default_root_dir) / "checkpoints") / "last.ckpt"
        trainer.save_checkpoint(path)
        why = "interrupted" if signum == signal.SIGINT else "asked to end"
        rank_zero_info(f"{why}: saved {path} at step {trainer.global_step}; go on with --ckpt_path last")


def asked(trainer: Trainer) -> int:
    """The signal that any of the processes received, 0 for none; every process must ask at the same point."""
    received: int = signals_of(trainer).received
    if trainer.world_size == 1:
        return received
    flag = torch.tensor(received, device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(flag, reduce_op="max"))


def exit_code(signum: int) -> int:
    """What a process that a signal ended exits with."""
    return INTERRUPTED if signum == signal.SIGINT else EXIT_CODE


def leave(trainer: Trainer, signum: int) -> Preempted:
    """The exit; a process that Lightning launched leaves the code to its parent, which it would kill otherwise."""
    environment = cluster_environment(trainer)
    launched = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
    return Preempted(0 if launched else exit_code(signum))


def requeue_signal(trainer: Trainer) -> int | None:
    """The signal with which SLURM asks for a requeue; None elsewhere."""
    environment = cluster_environment(trainer)
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment.requeue_signal or signal.SIGUSR1
    return None
