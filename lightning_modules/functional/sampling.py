"""Drawing a token from each row of logits, without sorting the vocabulary."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 64
"""Neighbouring tokens that are summed, or compared, together before one of them is looked for."""
NUCLEUS = 256
"""Likeliest tokens among which the smallest set of a probability is looked for before a row is sorted."""


def draw_tokens(
    logits: Float[Tensor, "batch vocab"],
    uniforms: Float[Tensor, " batch"],
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Invert each row's cumulative distribution at its uniform number; a row never depends on the others.

    Args:
        logits: Unnormalised log-probabilities; -inf for what cannot be drawn.
        uniforms: In 0..1, 1 excluded.
        temperature: The logits are divided by it; 0 takes the likeliest token, the first of several.
        top_p: Draw from the smallest set of likeliest tokens that holds this probability.
        top_k: Draw from so many likeliest tokens, before ``top_p`` is applied; 0 for all.

    Returns:
        The tokens, and their log-probabilities in nats and float32 under the distribution they were drawn from,
        truncation included: 0 for the likeliest token at temperature 0.
    """
    if temperature == 0:
        return _likeliest_token(logits), torch.zeros_like(uniforms)
    logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    if top_k:
        values, tokens = _likeliest(logits, top_k)
        return _draw_ranked(values.softmax(-1), tokens, uniforms, top_p=top_p)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        return _draw_nucleus(probabilities, uniforms, top_p=top_p)
    return _draw_any(probabilities, uniforms)


def _draw_any(
    probabilities: Float[Tensor, "batch vocab"], uniforms: Float[Tensor, " batch"]
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """First the block, then the token in it: a cumulative sum over the whole vocabulary costs more than a softmax."""
    cumulative = _by_block(probabilities, Tensor.sum, filler=0.0).cumsum(-1)
    target = uniforms * cumulative[:, -1]
    block = _inverse(cumulative, target)
    before = cumulative.gather(-1, (block - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    within, tokens = _blocks(probabilities, block.unsqueeze(1), filler=0.0)
    place = _inverse(within.cumsum(-1), target - torch.where(block > 0, before, 0.0)).unsqueeze(1)
    return tokens.gather(-1, place).squeeze(1), within.gather(-1, place).squeeze(1).log()


def _draw_nucleus(
    probabilities: Float[Tensor, "batch vocab"], uniforms: Float[Tensor, " batch"], *, top_p: float
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """On a CPU only rows whose likeliest few hundred tokens do not hold ``top_p`` are sorted."""
    if probabilities.device.type != "cpu":  # sorting takes little there, waiting to hear which rows need it does not
        return _draw_ranked(*probabilities.sort(-1, descending=True), uniforms, top_p=top_p)
    values, tokens = _likeliest(probabilities, NUCLEUS)
    drawn, log_probs = _draw_ranked(values, tokens, uniforms, top_p=top_p)
    wide = values.sum(-1) < top_p
    if values.shape[-1] < probabilities.shape[-1] and wide.any():
        drawn[wide], log_probs[wide] = _draw_ranked(
            *probabilities[wide].sort(-1, descending=True), uniforms[wide], top_p=top_p
        )
    return drawn, log_probs


def _draw_ranked(
    probabilities: Float[Tensor, "batch rank"],
    tokens: Int[Tensor, "batch rank"],
    uniforms: Float[Tensor, " batch"],
    *,
    top_p: float,
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Draw from tokens that are ordered by falling probability."""
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    outside[:, 0] = False
    kept = probabilities.masked_fill(outside, 0.0) if top_p < 1 else probabilities
    cumulative = kept.cumsum(-1)
    rank = _inverse(cumulative, uniforms * cumulative[:, -1]).unsqueeze(1)
    return tokens.gather(-1, rank).squeeze(1), (kept.gather(-1, rank) / cumulative[:, -1:]).squeeze(1).log()


def _inverse(cumulative: Float[Tensor, "batch place"], target: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """The first place whose sum is beyond the target; where rounding left none, the last that adds anything."""
    beyond = (cumulative <= target.unsqueeze(1)).sum(-1)
    last = (cumulative < cumulative[:, -1:]).sum(-1)
    return torch.minimum(beyond, last)


def _likeliest_token(logits: Float[Tensor, "batch vocab"]) -> Int[Tensor, " batch"]:
    block = _by_block(logits, Tensor.amax, filler=-torch.inf).argmax(-1, keepdim=True)
    values, tokens = _blocks(logits, block, filler=-torch.inf)
    return tokens.gather(-1, values.argmax(-1, keepdim=True)).squeeze(1)


def _likeliest(
    values: Float[Tensor, "batch vocab"], count: int
) -> tuple[Float[Tensor, "batch rank"], Int[Tensor, "batch rank"]]:
    """The ``count`` largest values in falling order, and their places; they lie in the ``count`` largest blocks."""
    vocab = values.shape[-1]
    if count * BLOCK >= vocab:
        return values.topk(min(count, vocab))
    blocks = _by_block(values, Tensor.amax, filler=-torch.inf).topk(count).indices
    candidates, tokens = _blocks(values, blocks, filler=-torch.inf)
    top = candidates.topk(count)
    return top.values, tokens.gather(-1, top.indices)


def _by_block(
    values: Float[Tensor, "batch vocab"], reduction: Callable[[Tensor, int], Tensor], *, filler: float
) -> Float[Tensor, "batch block"]:
    whole = values.shape[-1] // BLOCK * BLOCK
    reduced = reduction(values[:, :whole].unflatten(-1, (-1, BLOCK)), -1)
    if whole == values.shape[-1]:
        return reduced
    rest = torch.nn.functional.pad(values[:, whole:], (0, BLOCK - values.shape[-1] + whole), value=filler)
    return torch.cat([reduced, reduction(rest, -1).unsqueeze(1)], dim=-1)


def _blocks(
    values: Float[Tensor, "batch vocab"], blocks: Int[Tensor, "batch block"], *, filler: float
) -> tuple[Float[Tensor, "batch place"], Int[Tensor, "batch place"]]:
    """The values of some blocks, and the tokens they belong to; the last block may be filled up."""
    tokens = (blocks.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=values.device)).flatten(1)
    inside = values.gather(-1, tokens.clamp(max=values.shape[-1] - 1))
    return inside.masked_fill(tokens >= values.shape[-1], filler), tokens
