"""Fits the callbacks that monitor the evaluation, best checkpoint and early stopping, to epochs that have none."""

import math
from collections.abc import Callable

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from callbacks.evaluation.result import FIGURES, LOGGED
from core.errors import ConfigurationError

HOOKS = ("on_validation_end", "on_train_epoch_end")


class Monitors:
    """Which metrics of the evaluation are monitored, and whether they have been had.

    A checkpoint callback is given NaN where an epoch was not evaluated, which it ranks below any number. Early
    stopping would stop at a NaN, or count it as an epoch without improvement, so it is not asked at all.

    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._watched: list[EarlyStopping] = []
        self.evaluated = False
        """Whether the epoch has a valid evaluation."""

    def watch(self, trainer: Trainer, *, evaluates: bool) -> None:
        """Find the callbacks that monitor the evaluation.

        Raises:
            ConfigurationError: If one monitors what is never evaluated, or would keep the worst.
        """
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(callback, (EarlyStopping, ModelCheckpoint)):
                continue
            monitor = str(callback.monitor)
            if not monitor.startswith("eval/"):
                continue
            if not evaluates:
                raise ConfigurationError(f"{monitor} is monitored but never evaluated; raise evaluation.num_prompts")
            if monitor not in LOGGED:
                raise ConfigurationError(f"no evaluation logs {monitor}; monitor one of {', '.join(sorted(LOGGED))}")
            figure = FIGURES.get(monitor.removeprefix("eval/"))
            if figure is not None and figure.higher_is_better and callback.mode != "max":
                raise ConfigurationError(
                    f"{monitor} is better when it is higher; set the mode of {type(callback).__name__} to max "
                    "(--checkpoint.mode max)"
                )
            if isinstance(callback, EarlyStopping):
                for hook in HOOKS:
                    setattr(callback, hook, self._where_evaluated(monitor, getattr(callback, hook)))
                self._watched.append(callback)
            self.names.add(monitor)

    def release(self) -> None:
        """Leave the callbacks as they were."""
        for callback in self._watched:
            for hook in HOOKS:
                delattr(callback, hook)
        self._watched.clear()

    def _where_evaluated(self, monitor: str, check: Callable[[Trainer, LightningModule], None]) -> Callable[..., None]:
        def checked(trainer: Trainer, pl_module: LightningModule) -> None:
            value = trainer.callback_metrics.get(monitor)
            if self.evaluated and (value is None or math.isfinite(value)):  # a valid evaluation may lack this number
                check(trainer, pl_module)

        return checked
