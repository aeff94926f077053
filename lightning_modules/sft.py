"""Supervised fine-tuning: cross-entropy on every assistant turn, its end-of-turn token included."""

import torch
from torch import Tensor
from torchmetrics import MeanMetric
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
    def configure_model(self) -> None:
        super().configure_model()
        self.val_loss = MeanMetric()
        self.val_accuracy = MeanMetric()

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
        self.val_loss.update(-completions.log_probs)
        self.val_accuracy.update(completions.correct.float())

    @override
    def on_validation_epoch_end(self) -> None:
        loss = self.val_loss.compute()
        self.log("val/loss", loss, prog_bar=True)
        self.log("val/perplexity", torch.exp(loss))
        self.log("val/token_accuracy", self.val_accuracy.compute())
        self.val_loss.reset()
        self.val_accuracy.reset()
