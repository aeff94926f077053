"""A Bradley-Terry reward model: a scalar head on a language model, trained on preference pairs."""

from jaxtyping import Float
from torch import Tensor
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
        model = load_reward_model(self.loaded_name, self.tokenizer, new_head=True, quantization=self.quantization)
        return without_dropout(self.prepared(model))

    @override
    def validation_metrics(self) -> tuple[str, ...]:
        return "loss", "accuracy", "margin"

    @override
    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        losses, metrics = self.preference_losses(batch)
        self.log_step({name: values.mean() for name, values in metrics.items()}, batch_size=len(losses))
        return self.sum_for_step(losses, len(losses))

    @override
    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        _, metrics = self.preference_losses(batch)
        self.update_val(metrics)

    def preference_losses(
        self, batch: PreferenceBatch
    ) -> tuple[Float[Tensor, " pair"], dict[str, Float[Tensor, " pair"]]]:
        """The loss of each pair, and what there is to log of it, detached."""
        chosen, rejected = sequence_scores(self.model, batch.tokens, groups=batch.pairs()).chunk(2)
        losses, margins = bradley_terry_loss(chosen, rejected), (chosen - rejected).detach()
        return losses, {"loss": losses.detach(), "accuracy": accuracy(margins), "margin": margins}
