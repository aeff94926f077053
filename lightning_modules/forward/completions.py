"""The forward pass that every method shares: what the model says of the completion tokens, and nothing else."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from datamodules.batches import TokenBatch
from lightning_modules.forward.capabilities import capabilities, padded_inputs
from lightning_modules.forward.layout import flatten, model_inputs
from lightning_modules.forward.layout import position_ids as position_ids
from lightning_modules.functional.head import HeadOutput, chunks_of, head_log_probs
from lightning_modules.functional.log_probs import token_entropy, token_kl, token_log_probs
from lightning_modules.models.parts import body_of
from lightning_modules.models.sharding import run


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


class CompletionStates(NamedTuple):
    """The states that predict a batch's completion tokens, rows in reading order, and what makes them logits."""

    hidden: Float[Tensor, "token hidden"]
    """The logits themselves where there is no head."""
    head: torch.nn.Linear | None
    token_ids: Int[Tensor, " token"]
    sequence: Int[Tensor, " token"]
    batch_size: int

    def logits(self, rows: slice) -> Float[Tensor, "token vocab"]:
        """Logits of some of the tokens."""
        return self.hidden[rows] if self.head is None else self.head(self.hidden[rows])


def states_at(
    model: PreTrainedModel, batch: TokenBatch, wanted: Int[Tensor, " wanted"], groups: Sequence[int] | None = None
) -> Float[Tensor, "wanted hidden"]:
    """Last hidden states of attended tokens, given by their numbers in reading order; no padding where that can be."""
    body = body_of(model)
    mask = batch.attention_mask
    longest = capabilities(model).longest_flat_row
    if longest >= mask.shape[1] or longest >= mask.sum(1).max():
        flat = flatten(batch, groups)
        states: Tensor = run(model, body, **model_inputs(flat)).last_hidden_state[0]
        return states.index_select(0, flat.flat_index[wanted])
    states = run(model, body, **padded_inputs(batch)).last_hidden_state
    return states.flatten(0, 1).index_select(0, mask.flatten().nonzero()[:, 0][wanted])


def completion_states(
    model: PreTrainedModel, batch: TokenBatch, groups: Sequence[int] | None = None
) -> CompletionStates:
    """Run the model up to its output head."""
    mask = batch.attention_mask
    counted = batch.completion_mask & (mask.cumsum(1) > 1)  # nothing predicts the first token of a row
    if capabilities(model).plain_head:
        number = mask.flatten().cumsum(0).view_as(mask) - 1
        hidden = states_at(model, batch, number[counted] - 1, groups)
        head: Any = model.get_output_embeddings()
    else:
        hidden, head = _own_logits(model, batch, counted), None
    return CompletionStates(hidden, head, batch.input_ids[counted], counted.nonzero()[:, 0], len(mask))


def _own_logits(
    model: PreTrainedModel, batch: TokenBatch, counted: Bool[Tensor, "batch time"]
) -> Float[Tensor, "token vocab"]:
    """Logits by the model's own forward pass, padded, of the columns that predict some row's completion."""
    predicts = counted[:, 1:]
    columns = predicts.any(0).nonzero()[:, 0]
    logits: Tensor = model(**padded_inputs(batch), logits_to_keep=columns).logits
    return logits[predicts[:, columns]]


def completion_tokens(
    model: PreTrainedModel,
    batch: TokenBatch,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    accuracy: bool = False,
    groups: Sequence[int] | None = None,
    row_weights: Float[Tensor, " batch"] | None = None,
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
        row_weights: What the gradient of each row's log-probabilities will be, up to a factor common to all, where it
            is known before: the backward pass is then faster. Wrong ones cost time and change nothing.
    """
    return read_tokens(
        completion_states(model, batch, groups),
        temperature=temperature,
        entropy=entropy,
        accuracy=accuracy,
        row_weights=row_weights,
    )


def completion_losses(model: PreTrainedModel, batch: TokenBatch) -> Float[Tensor, " token"]:
    """Cross-entropy of the completion tokens, for a loss that is their sum or mean: told so, the head is faster."""
    alike = torch.ones(len(batch.input_ids), device=batch.input_ids.device)
    return -completion_tokens(model, batch, row_weights=alike).log_probs


def read_tokens(
    states: CompletionStates,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    accuracy: bool = False,
    row_weights: Float[Tensor, " batch"] | None = None,
) -> CompletionTokens:
    """The second half of ``completion_tokens``, for a caller that needs the states twice."""
    if states.head is None:
        logits = states.hidden
        output = HeadOutput(
            log_probs=token_log_probs(logits, states.token_ids, temperature=temperature),
            entropy=token_entropy(logits.detach(), temperature=temperature) if entropy else None,
            correct=logits.argmax(-1) == states.token_ids if accuracy else None,
        )
    else:
        output = head_log_probs(
            states.hidden,
            states.head.weight,
            states.head.bias,
            states.token_ids,
            temperature=temperature,
            entropy=entropy,
            accuracy=accuracy,
            weights=None if row_weights is None else row_weights[states.sequence].float(),
        )
    return CompletionTokens(*output, sequence=states.sequence, batch_size=states.batch_size)


KL_TENSORS = 6
"""Of the logits' size, that stand at once where two distributions are compared."""


@torch.no_grad()
def states_kl(policy: CompletionStates, reference: CompletionStates) -> Float[Tensor, " token"]:
    """KL(policy || reference) in nats over the vocabulary, at each completion token's prefix."""
    vocabulary = policy.hidden.shape[1] if policy.head is None else policy.head.out_features
    chunks = chunks_of(len(policy.hidden), KL_TENSORS * vocabulary, policy.hidden.device)
    parts = [token_kl(policy.logits(rows), reference.logits(rows)) for rows in chunks]
    return torch.cat(parts) if parts else policy.hidden.new_zeros(0)


def sequence_scores(
    model: PreTrainedModel, batch: TokenBatch, *, groups: Sequence[int] | None = None
) -> Float[Tensor, " batch"]:
    """The reward model's score of each sequence, read at its last attended token, in float32.

    A decoder is read by position, so it does not matter whether its pad token also ends turns. Any other classifier
    (BERT's kind) pools as it was trained to.
    """
    head = getattr(model, "score", None)
    if head is None:
        logits: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return logits[:, 0].float()
    last = batch.attention_mask.sum(1).cumsum(0) - 1
    pooled = states_at(model, batch, last, groups)
    with torch.autocast(pooled.device.type, enabled=False):  # bfloat16 would round scores near 10 to steps of 0.06
        scores: Tensor = head(pooled.to(head.weight.dtype))
    return scores[:, 0].float()
