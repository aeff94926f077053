"""Lightning's private names, all that this suite relies on: each here once, with what is relied on.

``tests/test_lightning_contract.py`` says which of them a release has changed. What ``commands/lightning.py`` overrides
of LightningCLI, and ``checkpoints/boundary_checkpoint.py`` of ModelCheckpoint, is in that test as well.
"""

from collections.abc import Callable
from typing import Any

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector as SignalConnector

__all__ = [
    "SignalConnector",
    "at_step_boundary",
    "before_connecting",
    "cluster_environment",
    "count_logged_steps",
    "ends_epoch",
    "epochs_begun",
    "install_signals",
    "log_step",
    "may_stop_early",
    "pending_metrics",
    "requeued_from",
    "save_and_requeue",
    "signals_of",
    "validation_follows",
]


def at_step_boundary(trainer: Trainer) -> bool:
    """Whether no gradient is accumulated that the next optimiser step would need.

    ``_should_accumulate`` is true where the batch that has just run was no window's last, an epoch's last aside.
    """
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def ends_epoch(trainer: Trainer) -> bool:
    """Whether the batch that has just run was the epoch's last."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def epochs_begun(trainer: Trainer) -> int:
    """How many epochs the run has begun, also where a resumed one has nothing left to do.

    ``current_epoch`` counts those that have ended, so it is one less within an epoch.
    """
    counts: Any = trainer.fit_loop.epoch_progress.current
    return int(counts.started)


def validation_follows(trainer: Trainer) -> bool:
    """Whether a validation is due after the batch that has just ended.

    ``_should_check_val_fx`` looks at intervals and at the fetcher's last batch, and changes nothing.
    """
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def may_stop_early(trainer: Trainer) -> bool:
    """Whether ``should_stop`` is to be followed: the least steps and epochs are done."""
    return trainer.fit_loop._can_stop_early


def log_step(trainer: Trainer) -> None:
    """Log the step that has just ended, as the loop does after the callbacks' turn."""
    trainer._logger_connector.on_batch_end()
    trainer._logger_connector.update_train_step_metrics()


def pending_metrics(trainer: Trainer) -> tuple[int, dict[str, float]] | None:
    """Step and values of what the loop logs of this batch once the callbacks have had their turn; None if nothing.

    Within ``on_train_batch_end`` the batch is processed and not completed. ``metrics`` is read without being changed.
    """
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    batches: Any = loop.batch_progress.current
    batch_has_ended = batches.completed == batches.processed
    if batch_has_ended or not trainer.training or not connector.should_update_logs or not at_step_boundary(trainer):
        return None
    metrics = {name: float(value) for name, value in connector.metrics["log"].items()}
    return (loop._batches_that_stepped, {**metrics, "epoch": trainer.current_epoch}) if metrics else None


def count_logged_steps(trainer: Trainer) -> None:
    """Have loggers count the steps as the optimiser does.

    ``_batches_that_stepped`` is the step that metrics are logged at; between batches it is the optimiser's count, save
    after some of Lightning's restarts.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def cluster_environment(trainer: Trainer) -> ClusterEnvironment | None:
    """Who launched the processes."""
    environment: ClusterEnvironment | None = trainer._accelerator_connector.cluster_environment
    return environment


def before_connecting(trainer: Trainer, work: Callable[[], None]) -> None:
    """Have each process do some work before it connects with the others, once it knows which one it is.

    ``setup_environment`` connects, before anything of the module or the data is looked at.
    """
    strategy = trainer.strategy
    connect = strategy.setup_environment

    def work_and_connect() -> None:
        set_ranks = getattr(strategy, "set_world_ranks", None)
        if set_ranks is not None:
            set_ranks()
        work()
        connect()

    strategy.setup_environment = work_and_connect  # type: ignore[method-assign]


def signals_of(trainer: Trainer) -> Any:
    """What handles the signals; the trainer registers its handlers when a fit or a validation begins."""
    return trainer._signal_connector


def install_signals(trainer: Trainer, signals: SignalConnector) -> None:
    """Have another handle them."""
    trainer._signal_connector = signals


def requeued_from(trainer: Trainer) -> str | None:
    """The checkpoint that SLURM's requeue left in the run's folder, which a fit goes on from where none is named."""
    return trainer._checkpoint_connector._hpc_resume_path


def save_and_requeue(trainer: Trainer, signum: int) -> None:
    """Save ``hpc_ckpt_N.ckpt`` and have SLURM run the job again, as Lightning's own handler does."""
    trainer._signal_connector._slurm_sigusr_handler_fn(signum, None)  # type: ignore[arg-type]
