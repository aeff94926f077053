"""ModelCheckpoint that saves at the boundary of an optimiser step alone, as accumulated gradients are in no file."""

import os
import re
import shutil
import time
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from callbacks.checkpoints.checkpoint_io import WholeCheckpointIO
from callbacks.checkpoints.disks import write_on_every_disk
from callbacks.lightning_internals import at_step_boundary, ends_epoch, validation_follows
from core.errors import ConfigurationError, NotWrittenError
from core.files import check_writable

LOGGED_ELSEWHERE = ("train/", "eval/", "lr-")
"""How metrics begin that no validation of the data logs."""


class BoundaryCheckpoint(ModelCheckpoint):
    """Saves only between optimiser steps, and validates there too, so the weights judged are the weights saved.

    Args:
        last_every_minutes: Save ``last.ckpt`` at least so often, whatever else is saved, so that a crash costs no
            more; null for only when the other options say so.
        options: Of Lightning's ModelCheckpoint.
    """

    _due = False
    """Whether a validation's save waits: for the end of the window of accumulation, or of the epoch."""

    def __init__(self, *args: Any, last_every_minutes: float | None = 30.0, **options: Any) -> None:
        super().__init__(*args, **options)
        if last_every_minutes is not None and last_every_minutes <= 0:
            raise ConfigurationError(f"checkpoint.last_every_minutes must be positive, got {last_every_minutes}")
        check_names(self.filename, self.dirpath, options.get("dirpath"))
        self.last_every_minutes = last_every_minutes
        self._saved_at = time.monotonic()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.dirpath is not None and trainer.is_global_zero:
            check_writable(Path(self.dirpath), option="checkpoint.dirpath")
        data: Any = getattr(trainer, "datamodule", None)
        interval, limit = trainer.val_check_interval, trainer.limit_train_batches
        if stage != "fit" or data is None or not isinstance(interval, int) or trainer.check_val_every_n_epoch is None:
            return
        batches = len(data.train_dataloader())
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        if interval > batches:  # as Lightning says once the model is loaded
            raise ConfigurationError(
                f"trainer.val_check_interval is {interval} batches and an epoch has {batches}; lower it, or set "
                "trainer.check_val_every_n_epoch to null to count over epochs"
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that the disk has room for what is saved first, so that one that fills up later costs a part of a run."""
        if self.dirpath is not None:
            write_on_every_disk(trainer, Path(self.dirpath))
        if self.dirpath is None or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        copies = 1 if any(Path(self.dirpath).glob("*.ckpt")) else 2  # the best and the last
        needed, free = copies * checkpoint_bytes(pl_module), shutil.disk_usage(self.dirpath).free
        if free < needed:
            raise ConfigurationError(
                f"the first checkpoints take about {needed / 1e6:,.1f} MB and {self.dirpath} has room for "
                f"{free / 1e6:,.1f} MB; make room there, or change checkpoint.dirpath"
            )

    @override
    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        """A checkpoint's own record of what was saved is data: what it names elsewhere is nothing to remove."""
        inside = self.dirpath is not None and Path(previous).resolve().parent == Path(self.dirpath).resolve()
        return inside and super()._should_remove_checkpoint(trainer, previous, current)

    @override
    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The validation has just shown all that it logs."""
        known = sorted(trainer.callback_metrics)
        for name, monitor in monitors(trainer):
            if monitor not in known and not monitor.startswith(LOGGED_ELSEWHERE):
                near = get_close_matches(monitor, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"it logs {', '.join(known)}"
                raise ConfigurationError(f"{name} is {monitor}, which no validation logs; {hint}")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        for name, monitor in monitors(trainer):
            if monitor.startswith("val/") and not trainer.enable_validation:
                raise ConfigurationError(
                    f"{name} is {monitor}, but there is no validation; set it to null, or raise "
                    "trainer.limit_val_batches"
                )
        self._saved_at = time.monotonic()
        window, interval = trainer.accumulate_grad_batches, trainer.val_check_batch
        if interval is not None and window <= interval < trainer.num_training_batches:
            trainer.val_check_batch = interval // window * window

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._due = not at_step_boundary(trainer) or ends_epoch(trainer)
        if not self._due:
            self._save_validated(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what a validation at the epoch's end asked for, once the epoch's other hooks have run."""
        if self._due:
            self._save_validated(trainer, pl_module)
        super().on_train_epoch_end(trainer, pl_module)

    def _save_validated(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._due = False
        super().on_train_batch_end(trainer, pl_module, None, None, trainer.fit_loop.batch_idx)  # every_n_train_steps
        super().on_validation_end(trainer, pl_module)
        self._save_if_late(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not at_step_boundary(trainer) or validation_follows(trainer):  # which ends with the same save, or a better
            return
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._due:
            self._save_validated(trainer, pl_module)
        self._save_if_late(trainer)

    def _save_if_late(self, trainer: Trainer) -> None:
        if self._late(trainer) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = Path(self.dirpath or trainer.default_root_dir) / "last.ckpt"
            self._attempt(lambda: write(trainer, partial(trainer.save_checkpoint, path)))
            self._saved_at = time.monotonic()

    @override
    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        write(trainer, partial(super()._save_checkpoint, trainer, filepath))
        self._saved_at = time.monotonic()

    @override
    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, torch.Tensor]) -> None:
        self._attempt(partial(super()._save_topk_checkpoint, trainer, monitor_candidates))

    @override
    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, torch.Tensor]) -> None:
        self._attempt(partial(super()._save_last_checkpoint, trainer, monitor_candidates))

    def _attempt(self, save: Callable[[], None]) -> None:
        """Save; where the disk takes nothing, go on with what is there, known as it was."""
        before = {**vars(self), "best_k_models": dict(self.best_k_models)}
        try:
            save()
        except NotWrittenError as error:
            vars(self).update(before)
            rank_zero_warn(f"training goes on without a checkpoint of this step: {error}")

    def _late(self, trainer: Trainer) -> bool:
        """Whether the last save is too long ago, by the first process's clock."""
        if self.last_every_minutes is None:
            return False
        late = time.monotonic() - self._saved_at >= 60 * self.last_every_minutes
        if trainer.world_size == 1:
            return late
        flag = torch.tensor(float(late and trainer.is_global_zero), device=trainer.strategy.root_device)
        return bool(trainer.strategy.reduce(flag, reduce_op="max"))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # in which ModelCheckpoint saves nothing but here
            super().on_train_end(trainer, pl_module)

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


def write(trainer: Trainer, save: Callable[[], None]) -> None:
    """Save; where the disk takes nothing raise a NotWrittenError, on every process and once all have come so far."""
    writer = trainer.strategy.checkpoint_io
    if not isinstance(writer, WholeCheckpointIO):
        save()
        return
    with writer.noting():
        save()
    told = str(writer.told or "")
    if trainer.num_nodes == 1:
        told = trainer.strategy.broadcast(told)
    elif dist.is_initialized():  # each machine may have written
        every: list[Any] = [""] * trainer.world_size
        dist.all_gather_object(every, told)
        told = next(filter(None, every), "")
    if told:
        raise NotWrittenError(told)


def check_names(filename: str | None, dirpath: Any, asked: Any) -> None:
    """Raise a ConfigurationError where a checkpoint's name would lead out of its folder."""
    plain = re.sub(r"\{[A-Za-z][\w/-]*(:[^{}/]*)?\}", "", filename or "")  # a metric's name may have a slash
    if any(part in plain for part in ("/", "\\", "..", "{")) or not plain.isprintable():
        raise ConfigurationError(
            f"checkpoint.filename must be a plain name within checkpoint.dirpath, got {filename!r}"
        )
    if asked is not None and (not str(asked).strip() or not str(dirpath).isprintable()):
        raise ConfigurationError(f"checkpoint.dirpath must name a folder, got {str(asked)!r}")


def checkpoint_bytes(module: LightningModule) -> int:
    """What a checkpoint takes on the disk: all weights, and AdamW's two moments of those that are trained."""
    weights: int = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    moments: int = 2 * sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    return weights + moments


def monitors(trainer: Trainer) -> list[tuple[str, str]]:
    """The option of each callback that monitors a metric, and which metric that is."""
    found = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        own = isinstance(callback, BoundaryCheckpoint)
        if isinstance(getattr(callback, "monitor", None), str):
            found.append(("checkpoint.monitor" if own else f"{type(callback).__name__}'s monitor", callback.monitor))
    return found
