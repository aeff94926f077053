"""Log-probabilities straight from hidden states: the logits exist for a chunk of tokens at a time, and are not kept.

Why: with 150,000 words the logits of 8,000 tokens take 5 GB in float32, and autograd would keep several tensors of
that size; the hidden states that they come from take 30 MB. Kept are the hidden states and one number a token, the
log of the softmax's denominator. The backward pass makes each chunk's logits again, unless the caller knew what the
gradients of the log-probabilities would be (all alike, for a mean over tokens): then the operands' gradients are made
while the logits are there, and the backward pass only scales them. That saves a quarter of the head's multiplications.

The derivative of log p(token) for a logit is ([it is the token's] - p) / temperature. The code keeps its negative
without the division, p minus 1 at the token ("slopes"), as it can be made in place of the logits, and a number for
each row ("scale") that puts sign, temperature and the softmax's denominator right where the rows are small: on the
hidden states.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**28}
"""Most that a chunk's float32 logits may take: large enough to keep the multiplications at their full rate."""


class HeadOutput(NamedTuple):
    """What an output head says of tokens; all in float32, the log-probabilities alone with gradient."""

    log_probs: Float[Tensor, " token"]
    entropy: Float[Tensor, " token"] | None
    correct: Bool[Tensor, " token"] | None


def head_log_probs(
    hidden: Float[Tensor, "token hidden"],
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None,
    token_ids: Int[Tensor, " token"],
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    accuracy: bool = False,
    weights: Float[Tensor, " token"] | None = None,
) -> HeadOutput:
    """Log-probability of each token under ``softmax((hidden @ weight.T + bias) / temperature)``, in nats.

    The multiplications run in the autocast dtype where autocast is on, else in the weight's; everything that sums over
    the vocabulary, and the weight's gradient over chunks, is float32.

    Args:
        hidden: Position t must be the state that predicts token t: the caller shifts.
        weight: Of the output head.
        bias: Of the output head, if it has one.
        token_ids: The tokens drawn.
        temperature: The logits are divided by it.
        entropy: Whether to give the entropy of each distribution too, without gradient.
        accuracy: Whether to say too which tokens are the likeliest.
        weights: What the gradient of each log-probability will be, up to a factor common to all, where it is known.
            The head's gradients are then computed on the way, and the backward pass need not compute the logits
            again. Should the gradient turn out otherwise, it does.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    known = weights if torch.is_grad_enabled() else None
    with torch.autocast(kind, enabled=False):
        return HeadOutput(
            *_HeadLogProbs.apply(hidden, weight, bias, token_ids, known, temperature, entropy, accuracy, dtype)
        )


def chunks_of(count: int, vocabulary: int, device: torch.device) -> list[slice]:
    """Ranges of tokens whose logits may exist at once."""
    size = max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * vocabulary))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def scaled_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float
) -> Float[Tensor, "token vocab"]:
    """Logits over the temperature, in float32 whatever the operands are; a tensor of its own."""
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


class _Gradients:
    """Gradients of log-probabilities for the head's operands, summed up over chunks of tokens."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, ...]) -> None:
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needed[2] else None

    def add(self, rows: slice, slopes: Tensor, scale: Tensor, weights: Tensor | None, h: Tensor, w: Tensor) -> None:
        """Add a chunk, where ``scale * slopes`` is the derivative for the logits."""
        slopes = slopes.to(w.dtype)
        if self.hidden is not None:
            self.hidden[rows] = (slopes @ w) * scale
        scale = scale if weights is None else scale * weights.unsqueeze(1)
        if self.weight is not None:
            scaled = (h[rows] * scale).to(w.dtype)
            if w.dtype == torch.float32:
                self.weight.addmm_(slopes.T, scaled)
            else:
                self.weight.add_(slopes.T @ scaled)
        if self.bias is not None:
            self.bias.add_((slopes.float() * scale).sum(0))


def _entropies(powers: Tensor, shifted: Tensor, total: Tensor) -> Float[Tensor, " token"]:
    """The sum of -p log p, where p is a power over the total, and log p the shifted logit minus the total's log."""
    mean = torch.bmm(powers.unsqueeze(1), shifted.unsqueeze(2))[:, 0] / total
    return (total.log() - mean)[:, 0]


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    @override
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        weights: Tensor | None,
        temperature: float,
        entropy: bool,
        accuracy: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        h, w, b = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        log_probs = torch.empty(len(h), dtype=torch.float32, device=h.device)
        log_sums = torch.empty_like(log_probs)
        entropies = torch.empty_like(log_probs) if entropy else None
        correct = torch.empty_like(token_ids, dtype=torch.bool) if accuracy else None
        gradients = None if weights is None else _Gradients(hidden, weight, bias, ctx.needs_input_grad)
        for rows in chunks_of(len(h), len(w), h.device):
            ids = token_ids[rows].unsqueeze(1)
            logits = scaled_logits(h[rows], w, b, temperature)
            if correct is not None:
                correct[rows] = logits.argmax(1) == ids[:, 0]
            chosen = logits.gather(1, ids)
            peak = logits.amax(1, keepdim=True)
            shifted = logits.sub_(peak)
            powers = shifted.exp() if entropies is not None else shifted.exp_()
            total = powers.sum(1, keepdim=True)
            log_sums[rows] = (peak + total.log())[:, 0]
            log_probs[rows] = (chosen - peak - total.log())[:, 0]
            if entropies is not None:
                entropies[rows] = _entropies(powers, shifted, total)
            if gradients is not None and weights is not None:
                slopes = powers.scatter_add_(1, ids, -total)  # p minus 1 at the token, times the total
                gradients.add(rows, slopes, -1 / (temperature * total), weights[rows], h, w)
        ctx.gradients, ctx.temperature, ctx.dtype = gradients, temperature, dtype
        ctx.save_for_backward(hidden, weight, bias, token_ids, weights, log_sums)
        ctx.mark_non_differentiable(*(extra for extra in (entropies, correct) if extra is not None))
        return log_probs, entropies, correct

    @staticmethod
    @override
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient = upstream[0]
        assert gradient is not None
        hidden, weight, bias, token_ids, weights, log_sums = ctx.saved_tensors
        gradients: _Gradients | None = ctx.gradients
        ctx.gradients = None  # scaled in place below, so of use once
        factor = None if gradients is None else common_factor(gradient, weights)
        if gradients is not None and factor is not None:
            by_operand = (gradients.hidden, gradient.unsqueeze(1)), (gradients.weight, factor), (gradients.bias, factor)
            for operand, scale in by_operand:
                if operand is not None:
                    operand.mul_(scale)
        else:
            gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad)
            h, w, b = hidden.to(ctx.dtype), weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
            with torch.autocast(hidden.device.type, enabled=False):
                for rows in chunks_of(len(h), len(w), h.device):
                    slopes = scaled_logits(h[rows], w, b, ctx.temperature).sub_(log_sums[rows, None]).exp_()
                    slopes[torch.arange(len(slopes), device=h.device), token_ids[rows]] -= 1
                    gradients.add(rows, slopes, -gradient[rows, None] / ctx.temperature, None, h, w)
        found = [(gradients.hidden, hidden), (gradients.weight, weight), (gradients.bias, bias)]
        return *(None if g is None else g.to(operand.dtype) for g, operand in found), *[None] * 6


def common_factor(gradient: Float[Tensor, " token"], weights: Float[Tensor, " token"]) -> Tensor | None:
    """The number by which the gradient is the weights, if there is one."""
    norm = weights.square().sum()
    factor = (gradient @ weights) / torch.where(norm > 0, norm, 1)
    return factor if torch.allclose(gradient, factor * weights, rtol=1e-5, atol=0) else None
