"""Sampling completions: one free function, shared by RLOO and the evaluation."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from datamodules.batches import TokenBatch
from lightning_modules.forward import position_ids


class Samples(NamedTuple):
    """Sampled completions behind their left-padded prompts; the completion mask covers the stop token too."""

    tokens: TokenBatch
    finished: Bool[Tensor, " batch"]
    """Whether the completion ended with a stop token, not at the length limit."""

    def completion_lengths(self) -> Int[Tensor, " batch"]:
        """Tokens of each completion, its stop token included."""
        return self.tokens.completion_mask.sum(1)

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The completions as text, without special tokens."""
        rows = zip(self.tokens.input_ids, self.tokens.completion_mask, strict=True)
        return [str(tokenizer.decode(ids[mask], skip_special_tokens=True)) for ids, mask in rows]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a cache and a mask that grow by a token would be compiled again at each
@torch.no_grad()
def sample_completions(
    model: PreTrainedModel,
    prompt_ids: Sequence[Int[Tensor, " _"]],
    *,
    max_completion_length: int,
    stop_token_ids: Sequence[int],
    seeds: Sequence[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Samples:
    """Sample one completion for each prompt, up to its stop token or the length limit.

    A completion is drawn by inverting its distribution at uniform numbers that come from its own seed alone, so on
    the CPU in float32 it does not depend on the prompts beside it.

    Args:
        model: Any causal language model of transformers; it is put into eval mode while it samples.
        prompt_ids: Unpadded prompts.
        max_completion_length: Most tokens of a completion, the stop token included.
        stop_token_ids: Tokens that end a completion.
        seeds: One for each prompt.
        temperature: The logits are divided by it; 0 takes the likeliest token.
        top_p: Sample from the smallest set of likeliest tokens that holds this probability.
    """
    was_training = model.training
    model.eval()
    try:
        device = model.device
        stops = torch.tensor(list(stop_token_ids), device=device)
        ids, attention_mask = _left_padded(prompt_ids, device, pad_token_id=int(stops[0]))
        uniforms = _uniforms(seeds, max_completion_length).to(device)
        cache = DynamicCache(config=model.config)
        positions = position_ids(attention_mask)
        finished = torch.zeros(len(ids), dtype=torch.bool, device=device)
        sampled: list[Tensor] = []
        alive: list[Tensor] = []
        step_ids = ids
        for step in range(max_completion_length):
            logits = model(
                input_ids=step_ids,
                attention_mask=attention_mask,
                position_ids=positions,
                past_key_values=cache,
                logits_to_keep=1,
                use_cache=True,
            ).logits[:, -1]
            token = _draw(logits, uniforms[:, step], temperature=temperature, top_p=top_p)
            token = torch.where(finished, stops[0], token)
            sampled.append(token)
            alive.append(~finished)
            finished = finished | torch.isin(token, stops)
            if finished.all():
                break
            step_ids = token.unsqueeze(1)
            attention_mask = torch.cat([attention_mask, torch.ones_like(step_ids, dtype=torch.bool)], dim=1)
            positions = positions[:, -1:] + 1
    finally:
        model.train(was_training)
    completion_mask = torch.stack(alive, dim=1)
    prompt_mask = attention_mask[:, : ids.shape[1]]
    tokens = TokenBatch(
        input_ids=torch.cat([ids, torch.stack(sampled, dim=1)], dim=1),
        attention_mask=torch.cat([prompt_mask, completion_mask], dim=1),
        completion_mask=torch.cat([torch.zeros_like(prompt_mask), completion_mask], dim=1),
    )
    return Samples(tokens, finished)


def _left_padded(
    prompt_ids: Sequence[Tensor], device: torch.device, *, pad_token_id: int
) -> tuple[Int[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
    width = max(map(len, prompt_ids))
    ids = torch.full((len(prompt_ids), width), pad_token_id, dtype=torch.long, device=device)
    mask = torch.zeros(len(prompt_ids), width, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompt_ids):
        ids[row, width - len(prompt) :] = prompt.to(device)
        mask[row, width - len(prompt) :] = True
    return ids, mask


def _uniforms(seeds: Sequence[int], count: int) -> Float[Tensor, "batch step"]:
    generator = torch.Generator()
    return torch.stack([torch.rand(count, generator=generator.manual_seed(seed)) for seed in seeds])


def _draw(
    logits: Float[Tensor, "batch vocab"], uniforms: Float[Tensor, " batch"], *, temperature: float, top_p: float
) -> Int[Tensor, " batch"]:
    """Invert the cumulative distribution of each row at its uniform number."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p
        probabilities = probabilities.scatter(-1, order, ordered.masked_fill(outside, 0.0))
    cumulative = probabilities.cumsum(-1)
    drawn = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1]).unsqueeze(1), right=True).squeeze(1)
    likeliest = probabilities.argmax(-1)  # for a uniform number that rounding put beyond the last probability
    return torch.where(drawn < logits.shape[-1], drawn, likeliest)
