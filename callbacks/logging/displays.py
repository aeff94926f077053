"""What a run shows in a terminal or a log: the model in a line, and its progress."""

import sys

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedModel
from typing_extensions import override

from callbacks.logging.line_progress import LineProgress
from callbacks.logging.terminal_progress import TerminalProgress
from lightning_modules.models.sharding import plain_class


class ModelLine(Callback):
    """Says before training how large the model is, and how much of it is trained."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(model := pl_module.model, PreTrainedModel):
            rank_zero_info(described(model))


def described(model: PreTrainedModel) -> str:
    """A model's class, its parameters, and those that are trained."""
    total, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    part = "all" if trained == total else f"{trained:,} ({trained / total:.2%})"
    return f"{plain_class(model).__name__} of {total:,} parameters, {part} of them trained"


def displays(*, progress: bool, model: bool) -> list[Callback]:
    """The callbacks that show a run."""
    shown: list[Callback] = [ModelLine()] if model else []
    if progress:
        shown.append(TerminalProgress() if sys.stdout.isatty() else LineProgress())
    return shown
