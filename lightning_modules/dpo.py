"""Direct preference optimisation: the policy's own log-ratios to a frozen reference are the reward."""

import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from core.errors import ConfigurationError
from datamodules.batches import PreferenceBatch
from lightning_modules.base import FineTuningModule, require
from lightning_modules.forward.completions import (
    CompletionTokens,
    completion_states,
    completion_tokens,
    read_tokens,
    states_kl,
)
from lightning_modules.functional.preference import (
    accuracy,
    conservative_loss,
    hinge_loss,
    ipo_loss,
    robust_loss,
    sigmoid_loss,
)
from lightning_modules.models.identity import weights_digest
from lightning_modules.models.loading import load_causal_lm, without_dropout
from lightning_modules.models.reference import make_reference
from lightning_modules.models.reference_cache import PairTable, ask_about_run, everywhere, look_up

Loss = Literal["sigmoid", "hinge", "ipo", "conservative", "robust"]


class PairLogProbs(NamedTuple):
    """Log-probabilities of whole completions, in nats, and their lengths in tokens."""

    chosen: Float[Tensor, " pair"]
    rejected: Float[Tensor, " pair"]
    chosen_tokens: Float[Tensor, " pair"]
    rejected_tokens: Float[Tensor, " pair"]


class DPOModule(FineTuningModule):
    """Trains on preference pairs, against the starting policy unless another reference is named.

    Args:
        beta: How strongly the policy is held to the reference (IPO's tau where the loss is ``ipo``).
        loss: ``sigmoid`` (DPO), ``hinge`` (SLiC), ``ipo``, ``conservative`` (cDPO) or ``robust``.
        label_smoothing: Probability that a label is swapped, for ``conservative`` and ``robust``.
        sft_weight: Weight of the chosen completion's mean token cross-entropy, added to the loss.
        reference_model: Hub id or directory of the reference; the starting policy where it is not given.
        precompute_reference: Ask the reference once about every pair, before training, and keep its log-probabilities
            in ``cache/`` beside the run's folder; it is then in memory only before training and in validations.
    """

    method = "dpo"
    method_name = "direct preference optimisation"
    task = "preferences"

    def __init__(
        self,
        beta: float = 0.1,
        loss: Loss = "sigmoid",
        label_smoothing: float = 0.0,
        sft_weight: float = 0.0,
        reference_model: str | None = None,
        precompute_reference: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        require(beta > 0, "model.beta must be positive", beta)
        require(0 <= label_smoothing < 0.5, "model.label_smoothing must be within 0..0.5", label_smoothing)
        require(sft_weight >= 0, "model.sft_weight must not be negative", sft_weight)
        smooths = loss in ("conservative", "robust")
        if smooths != (label_smoothing > 0):
            raise ConfigurationError(
                f"model.label_smoothing belongs to the conservative and robust losses, which need it above 0; "
                f"got {label_smoothing} with model.loss {loss}"
            )
        self.beta = beta
        self.loss = loss
        self.label_smoothing = label_smoothing
        self.sft_weight = sft_weight
        self.reference_model = reference_model
        self.precompute_reference = precompute_reference
        self.reference = make_reference(
            reference_model,
            adapted=self.lora is not None,
            name=self.model_name,
            start=lambda: load_causal_lm(self.model_name, self.tokenizer),
            tokenizer=lambda: self.tokenizer,
        )
        self._reference_table: PairTable = {}

    @override
    def load_model(self) -> PreTrainedModel:
        return without_dropout(super().load_model())

    @override
    def on_train_start(self) -> None:
        if self.precompute_reference:
            with self.reference.beside(self.model) as reference:
                digest = weights_digest(reference)[:32]
            name = f"reference-{digest}-{self.trainer.precision}-{self.device.type}.jsonl"
            file = Path(self.trainer.default_root_dir).parent / "cache" / name
            self._reference_table = ask_about_run(self.trainer, self.reference_log_probs, file)
            self.reference.free()

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, PreferenceBatch) and self._reference_table and self.trainer.training:
            found = look_up(self._reference_table, batch)
            known = everywhere(self.trainer, found is not None)
            return batch._replace(reference_log_probs=found if known else None)
        return batch

    @override
    def validation_metrics(self) -> tuple[str, ...]:
        return "loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "kl"

    @override
    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        policy = pair_log_probs(completion_tokens(self.model, batch.tokens, groups=batch.pairs()))
        reference_log_probs = batch.reference_log_probs
        if reference_log_probs is None:
            reference_log_probs = self.reference_log_probs(batch)
        chosen, rejected = reference_log_probs.chunk(2)
        losses, metrics = self.preference_losses(policy, policy._replace(chosen=chosen, rejected=rejected))
        if self.is_first_step and self.reference_model in (None, self.model_name):
            self.check_policy_is_reference(metrics["margin"])
        metrics["loss"] = losses.detach()
        self.log_step({name: values.mean() for name, values in metrics.items()}, batch_size=len(losses))
        return self.sum_for_step(losses, len(losses))

    @override
    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        policy = completion_states(self.model, batch.tokens, batch.pairs())
        with self.reference.beside(self.model) as model:
            reference = completion_states(model, batch.tokens, batch.pairs())
        losses, metrics = self.preference_losses(
            pair_log_probs(read_tokens(policy)), pair_log_probs(read_tokens(reference))
        )
        kl = states_kl(policy, reference)  # over the data's prefixes, nats per token
        self.update_val({**metrics, "loss": losses, "kl": kl})

    @torch.no_grad()
    def reference_log_probs(self, batch: PreferenceBatch) -> Float[Tensor, " batch"]:
        """What the reference gives to each completion, all chosen first."""
        with self.reference.beside(self.model) as model:
            completions = completion_tokens(model, batch.tokens, groups=batch.pairs())
        return completions.sum_by_sequence(completions.log_probs)

    @override
    def on_validation_end(self) -> None:
        if self.precompute_reference and not self.trainer.sanity_checking:
            self.reference.free()

    def preference_losses(
        self, policy: PairLogProbs, reference: PairLogProbs
    ) -> tuple[Float[Tensor, " pair"], dict[str, Float[Tensor, " pair"]]]:
        """The loss of each pair, and what there is to log of it, detached."""
        chosen_log_ratios = policy.chosen - reference.chosen
        rejected_log_ratios = policy.rejected - reference.rejected
        difference = chosen_log_ratios - rejected_log_ratios
        losses = self.pair_loss(difference)
        if self.sft_weight:
            losses = losses - self.sft_weight * policy.chosen / policy.chosen_tokens
        metrics = {
            "margin": self.beta * difference,
            "accuracy": accuracy(difference),
            "chosen_reward": self.beta * chosen_log_ratios,
            "rejected_reward": self.beta * rejected_log_ratios,
            "chosen_log_probs": policy.chosen,
            "rejected_log_probs": policy.rejected,
        }
        return losses, {name: values.detach() for name, values in metrics.items()}

    def pair_loss(self, difference: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        """The chosen loss of the difference of the two log-ratios."""
        if self.loss == "ipo":
            return ipo_loss(difference, beta=self.beta)
        margins = self.beta * difference
        if self.loss == "hinge":
            return hinge_loss(margins)
        if self.loss == "conservative":
            return conservative_loss(margins, label_smoothing=self.label_smoothing)
        if self.loss == "robust":
            return robust_loss(margins, label_smoothing=self.label_smoothing)
        return sigmoid_loss(margins)

    def check_policy_is_reference(self, margins: Float[Tensor, " pair"]) -> None:
        """Before the first update the policy is the reference, so every margin is 0 and the DPO loss ln 2.

        Raises:
            RuntimeError: If it is not: the two differ in weights, dtype or dropout.
        """
        tolerance = 1e-3 if self.model.dtype == torch.float32 and not torch.is_autocast_enabled() else 0.1
        loss = sigmoid_loss(margins).mean().item()
        if not (margins.abs().max() <= tolerance and abs(loss - math.log(2)) <= tolerance):  # a NaN is no match
            raise RuntimeError(
                f"before the first step the margins must be 0 and the loss ln 2 = 0.6931, got a margin of up to "
                f"{margins.abs().max():.4f} and a loss of {loss:.4f}: policy and reference differ"
            )


def pair_log_probs(completions: CompletionTokens) -> PairLogProbs:
    """Log-probabilities of both completions of each pair, summed over their tokens."""
    sums = completions.sum_by_sequence(completions.log_probs).chunk(2)
    counts = completions.count_by_sequence().to(completions.log_probs.dtype).chunk(2)
    return PairLogProbs(sums[0], sums[1], counts[0], counts[1])
