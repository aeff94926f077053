"""Sampling completions: one free function, shared by RLOO and the evaluation."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.batches import TokenBatch
from lightning_modules.functional.sampling import draw_tokens
from lightning_modules.generation.decoders import decoder
from lightning_modules.generation.modes import evaluating
from lightning_modules.generation.transformers_decoder import left_padded

STEPS_BETWEEN_LOOKS = 16
"""Tokens between looks for finished rows on an accelerator, where each look waits for it."""


class Samples(NamedTuple):
    """Sampled completions behind their left-padded prompts; the completion mask covers the stop token too."""

    tokens: TokenBatch
    finished: Bool[Tensor, " batch"]
    """Whether the completion ended with a stop token, not at the length limit."""
    log_probs: Float[Tensor, " token"]
    """Of each completion token under the distribution that it was drawn from, rows in reading order; float32 nats."""

    def completion_lengths(self) -> Int[Tensor, " batch"]:
        """Tokens of each completion, its stop token included."""
        return self.tokens.completion_mask.sum(1)

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The completions as text, without special tokens."""
        rows = zip(self.tokens.input_ids, self.tokens.completion_mask, strict=True)
        return [str(tokenizer.decode(ids[mask], skip_special_tokens=True)) for ids, mask in rows]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # caches and masks that grow would be compiled again at each token
@torch.no_grad()
def sample_completions(
    model: PreTrainedModel,
    prompt_ids: Sequence[Int[Tensor, " _"]],
    *,
    max_completion_length: int,
    stop_token_ids: Sequence[int],
    seeds: Sequence[int],
    samples_per_prompt: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_length: int = 0,
    on_tokens: Callable[[Int[Tensor, " row"], Int[Tensor, " row"], Bool[Tensor, " row"]], None] | None = None,
) -> Samples:
    """Complete each prompt, up to a stop token or the length limit.

    A completion is drawn by inverting its distribution at uniform numbers that come from its own seed alone. On the
    CPU in float32 it is the same whatever stands beside it, bit for bit, if the model is of the family that
    ``decode.FamilyDecoder`` knows and torch has oneDNN (any x86 build); elsewhere another batch may round logits
    otherwise, and so, rarely, draw another token.

    Args:
        model: Any causal language model of transformers; it is in eval mode while it samples.
        prompt_ids: Unpadded prompts, each read once.
        max_completion_length: Most tokens of a completion, the stop token included.
        stop_token_ids: Tokens that end a completion; with none, each has the greatest length.
        seeds: One for each sample; a prompt's samples are neighbours.
        samples_per_prompt: Completions of each prompt.
        temperature: The logits are divided by it; 0 takes the likeliest token.
        top_p: Sample from the smallest set of likeliest tokens that holds this probability.
        top_k: Sample from so many likeliest tokens; 0 for all.
        min_length: No stop token is among a completion's first so many tokens.
        on_tokens: Told after each step the samples at hand, a token of each, and of which it is a further one, as on an
            accelerator one may stay that has ended; what it raises ends all.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    stops = torch.tensor([token for token in stop_token_ids if token < vocabulary], dtype=torch.long)
    pad_token_id = int(stops[0]) if len(stops) else 0
    uniforms = _uniforms(seeds, max_completion_length).to(model.device)
    stops = stops.to(model.device)
    tokens = torch.full(uniforms.shape, pad_token_id, device=model.device)
    log_probs = torch.zeros_like(uniforms)
    rows = torch.arange(len(seeds), device=model.device)  # what each row of the decoder is a completion of
    ended = torch.zeros_like(rows, dtype=torch.bool)
    how: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    with evaluating(model):
        limits = {"samples_per_prompt": samples_per_prompt, "max_completion_length": max_completion_length}
        decoding = decoder(model, prompt_ids, **limits)
        logits = decoding.start()
        for step in range(max_completion_length):
            if step < min_length:
                logits = logits.index_fill(-1, stops, -torch.inf)
            drawn, log_prob = draw_tokens(logits, uniforms[rows, step], **how)
            tokens[rows, step], log_probs[rows, step] = drawn, log_prob
            if on_tokens is not None:
                on_tokens(rows, drawn, ~ended)
            ended |= torch.isin(drawn, stops)
            if step + 1 == max_completion_length or (leaves := _leaves(ended, step)) == len(rows):
                break
            if leaves:
                kept = _order_without(ended)
                decoding.keep(kept)
                rows, drawn, ended = rows[kept], drawn[kept], ended[kept]
            logits = decoding.step(drawn)
    return _samples(prompt_ids, samples_per_prompt, tokens, log_probs, stops=stops, pad_token_id=pad_token_id)


def _uniforms(seeds: Sequence[int], count: int) -> Float[Tensor, "batch step"]:
    generator = torch.Generator()
    draw = partial(torch.rand, count, dtype=torch.float32)  # whatever the default is: bfloat16 has 256 numbers in 0..1
    return torch.stack([draw(generator=generator.manual_seed(seed)) for seed in seeds])


def _leaves(ended: Bool[Tensor, " batch"], step: int) -> int:
    """How many rows leave at this step.

    On a CPU each that has ended. On an accelerator a look waits for it, and a smaller batch is a new graph to capture
    for little less time a step: so it looks seldom, and rows leave when half of them can.
    """
    if ended.device.type == "cpu":
        return int(ended.sum())
    if (step + 1) % STEPS_BETWEEN_LOOKS:
        return 0
    count = int(ended.sum())
    return count if 2 * count >= len(ended) else 0


def _order_without(ended: Bool[Tensor, " batch"]) -> Int[Tensor, " kept"]:
    """The rows that go on: the last of them in the places that have become free, all others where they are."""
    going_on = (~ended).nonzero().squeeze(1)
    order = torch.arange(len(going_on), device=ended.device)
    order[ended[: len(order)]] = going_on[going_on >= len(order)]
    return order


def _samples(
    prompt_ids: Sequence[Tensor],
    samples_per_prompt: int,
    tokens: Int[Tensor, "batch step"],
    log_probs: Float[Tensor, "batch step"],
    *,
    stops: Int[Tensor, " stop"],
    pad_token_id: int,
) -> Samples:
    is_stop = torch.isin(tokens, stops)
    completion_mask = is_stop.cumsum(1) - is_stop.long() == 0
    longest = int(completion_mask.any(0).sum())
    completion_mask = completion_mask[:, :longest]
    completions = tokens[:, :longest].masked_fill(~completion_mask, pad_token_id)
    ids, prompt_mask = (
        part.to(tokens.device).repeat_interleave(samples_per_prompt, dim=0)
        for part in left_padded(prompt_ids, pad_token_id=pad_token_id)
    )
    batch = TokenBatch(
        input_ids=torch.cat([ids, completions], dim=1),
        attention_mask=torch.cat([prompt_mask, completion_mask], dim=1),
        completion_mask=torch.cat([torch.zeros_like(prompt_mask), completion_mask], dim=1),
    )
    return Samples(batch, is_stop.any(1), log_probs[:, :longest][completion_mask])
