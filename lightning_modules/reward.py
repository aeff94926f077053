"""A Bradley-Terry reward model: a scalar head on a language model, trained on preference pairs."""

from torch import Tensor
from torchmetrics import MeanMetric
from transformers import PreTrainedModel
from typing_extensions import override

from datamodules.batches import PreferenceBatch
from lightning_modules.base import FineTuningModule
from lightning_modules.forward.completions import sequence_scores
from lightning_modules.functional.preference import accuracy, bradley_terry_loss
from lightning_modules.models.loading import load_reward_model, without_dropout


class RewardModule(FineTuningModule):
    """Trains on preference pairs; the head starts at zero and is read at the last token of the conversation."""

    method = "reward"
    method_name = "a Bradley-Terry reward model's loss"
    task = "preferences"
    can_generate = False

    @override
    def load_model(self) -> PreTrainedModel:
        model = without_dropout(load_reward_model(self.model_name, self.tokenizer, new_head=True))
        model.train()
        return model

    @override
    def configure_model(self) -> None:
        super().configure_model()
        self.val_loss = MeanMetric()
        self.val_accuracy = MeanMetric()
        self.val_margin = MeanMetric()

    @override
    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        chosen, rejected = sequence_scores(self.model, batch.tokens, groups=batch.pairs()).chunk(2)
        losses = bradley_terry_loss(chosen, rejected)
        metrics = {
            "loss": losses.mean(),
            "accuracy": accuracy(chosen - rejected).mean(),
            "margin": (chosen - rejected).mean(),
        }
        self.log_step({name: value.detach() for name, value in metrics.items()}, batch_size=len(losses))
        return self.sum_for_step(losses, len(losses))

    @override
    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        chosen, rejected = sequence_scores(self.model, batch.tokens, groups=batch.pairs()).chunk(2)
        self.val_loss.update(bradley_terry_loss(chosen, rejected))
        self.val_accuracy.update(accuracy(chosen - rejected))
        self.val_margin.update(chosen - rejected)

    @override
    def on_validation_epoch_end(self) -> None:
        for name in ("loss", "accuracy", "margin"):
            metric = getattr(self, f"val_{name}")
            self.log(f"val/{name}", metric.compute(), prog_bar=name == "accuracy")
            metric.reset()
