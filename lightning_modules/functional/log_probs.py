"""Log-probabilities and entropies of tokens, from logits, in float32 nats."""

from jaxtyping import Float, Int
from torch import Tensor


def token_log_probs(
    logits: Float[Tensor, "*axes vocab"], token_ids: Int[Tensor, "*axes"], *, temperature: float = 1.0
) -> Float[Tensor, "*axes"]:
    """Log-probability of each token under its own row of logits.

    Position t of ``logits`` must be the distribution that token t was drawn from: the caller shifts.

    Args:
        logits: Unnormalised scores of any floating dtype; the log-sum-exp is taken in float32.
        token_ids: The tokens drawn.
        temperature: The sampling temperature the logits are divided by.
    """
    scaled = logits.float() / temperature
    chosen = scaled.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return chosen - scaled.logsumexp(-1)


def token_entropy(logits: Float[Tensor, "*axes vocab"], *, temperature: float = 1.0) -> Float[Tensor, "*axes"]:
    """Entropy in nats of the distribution at each position."""
    log_probs = (logits.float() / temperature).log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def token_kl(
    logits: Float[Tensor, "*axes vocab"], reference_logits: Float[Tensor, "*axes vocab"]
) -> Float[Tensor, "*axes"]:
    """KL(policy || reference) in nats at each position, summed over the vocabulary, so exact for its prefix."""
    log_probs = logits.float().log_softmax(-1)
    return (log_probs.exp() * (log_probs - reference_logits.float().log_softmax(-1))).sum(-1)
