"""The forward pass that every method shares: what the model says of the completion tokens, and nothing else."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from datamodules.batches import TokenBatch
from lightning_modules.functional.log_probs import token_entropy, token_log_probs


class CompletionTokens(NamedTuple):
    """What a model says of a batch's completion tokens, rows in reading order."""

    log_probs: Float[Tensor, " token"]
    """In nats, at the temperature asked for; float32."""
    entropy: Float[Tensor, " token"] | None
    """Of the distribution that the token was drawn from, in nats and without gradient, where asked for."""
    correct: Bool[Tensor, " token"] | None
    """Whether the token is the likeliest one, where asked for."""
    sequence: Int[Tensor, " token"]
    """Which row of the batch a token belongs to."""
    batch_size: int

    def sum_by_sequence(self, values: Float[Tensor, " token"]) -> Float[Tensor, " batch"]:
        """Sum what belongs to each completion."""
        return values.new_zeros(self.batch_size).index_add(0, self.sequence, values)

    def count_by_sequence(self) -> Int[Tensor, " batch"]:
        """Tokens of each completion."""
        return torch.bincount(self.sequence, minlength=self.batch_size)


class CompletionLogits(NamedTuple):
    """The distributions that a batch's completion tokens were drawn from, one row a token, rows in reading order."""

    logits: Float[Tensor, "token vocab"]
    token_ids: Int[Tensor, " token"]
    sequence: Int[Tensor, " token"]
    """Which row of the batch a token belongs to."""
    batch_size: int

    def sum_by_sequence(self, values: Float[Tensor, " token"]) -> Float[Tensor, " batch"]:
        """Sum what belongs to each completion."""
        return values.new_zeros(self.batch_size).index_add(0, self.sequence, values)

    def count_by_sequence(self) -> Int[Tensor, " batch"]:
        """Tokens of each completion."""
        return torch.bincount(self.sequence, minlength=self.batch_size)


def position_ids(attention_mask: Bool[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """Positions that count attended tokens alone, so that padding on either side changes nothing."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def completion_logits(model: PreTrainedModel, batch: TokenBatch) -> CompletionLogits:
    """Run the model, with its output head on the positions that predict some row's completion.

    Args:
        model: Any causal language model of transformers.
        batch: Padded on either side.
    """
    predicts = batch.completion_mask[:, 1:]
    columns = predicts.any(0).nonzero().squeeze(1)  # position t predicts token t + 1
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=position_ids(batch.attention_mask),
        logits_to_keep=columns,
        use_cache=False,
    ).logits
    kept = predicts[:, columns]
    return CompletionLogits(
        logits=logits[kept],
        token_ids=batch.input_ids[:, 1:][:, columns][kept],
        sequence=kept.nonzero()[:, 0],
        batch_size=len(kept),
    )


def completion_tokens(
    model: PreTrainedModel,
    batch: TokenBatch,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    accuracy: bool = False,
    groups: Sequence[int] | None = None,
) -> CompletionTokens:
    """Log-probabilities of the completion tokens, with gradient.

    Args:
        model: Any causal language model of transformers.
        batch: Padded on either side.
        temperature: The logits are divided by it.
        entropy: Whether to give the entropies too.
        accuracy: Whether to say too which tokens are the likeliest.
        groups: A number for each row; rows of one number begin alike (the completions of a pair, the samples of a
            prompt), and what they have in common from their first token on is run once.
    """
    completions = completion_logits(model, batch)
    logits = completions.logits
    return CompletionTokens(
        log_probs=token_log_probs(logits, completions.token_ids, temperature=temperature),
        entropy=token_entropy(logits.detach(), temperature=temperature) if entropy else None,
        correct=logits.argmax(-1) == completions.token_ids if accuracy else None,
        sequence=completions.sequence,
        batch_size=completions.batch_size,
    )


def sequence_scores(model: PreTrainedModel, batch: TokenBatch) -> Float[Tensor, " batch"]:
    """The reward model's score of each sequence, read at its last attended token, in float32.

    A decoder is read by position, so it does not matter whether its pad token also ends turns. Any other classifier
    (BERT's kind) pools as it was trained to.
    """
    head = getattr(model, "score", None)
    if head is None:
        logits: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return logits[:, 0].float()
    hidden = model.base_model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=position_ids(batch.attention_mask),
        use_cache=False,
    ).last_hidden_state
    width = batch.attention_mask.shape[1]
    last = width - 1 - batch.attention_mask.long().flip(-1).argmax(-1)
    pooled = hidden[torch.arange(len(last), device=last.device), last]
    with torch.autocast(pooled.device.type, enabled=False):  # bfloat16 would round scores near 10 to steps of 0.06
        scores: Tensor = head(pooled.to(head.weight.dtype))
    return scores[:, 0].float()
