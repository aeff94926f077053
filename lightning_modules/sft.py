"""Supervised fine-tuning: cross-entropy on every assistant turn, its end-of-turn token included."""

import torch
from torch import Tensor
from typing_extensions import override

from datamodules.batches import TokenBatch
from lightning_modules.base import FineTuningModule, require
from lightning_modules.forward.completions import completion_losses, completion_tokens


class SFTModule(FineTuningModule):
    """Trains on conversations; the loss is the mean over the supervised tokens of the whole optimiser step."""

    method = "sft"
    method_name = "supervised fine-tuning"
    task = "conversations"

    @override
    def validation_metrics(self) -> tuple[str, ...]:
        return "loss", "token_accuracy"

    @override
    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        losses = completion_losses(self.model, batch)
        if self.is_first_step:
            require(len(losses) > 0, "the first batch must have supervised tokens", 0)
        self.log("train/loss", losses.detach().mean(), prog_bar=True, batch_size=len(losses))
        self.log("train/tokens", float(len(losses)), batch_size=1, reduce_fx="sum")
        return self.sum_for_step(losses, len(losses))

    @override
    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        completions = completion_tokens(self.model, batch, accuracy=True)
        assert completions.correct is not None
        self.update_val({"loss": -completions.log_probs, "token_accuracy": completions.correct.float()})

    @override
    def on_validation_epoch_end(self) -> None:
        self.log("val/perplexity", torch.exp(self.val_metrics["loss"].compute()))  # type: ignore[operator]
        super().on_validation_epoch_end()
