"""Samples of a batch of prompts in training: their seeds, their scores, and what there is to log of them."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from core.errors import ConfigurationError
from datamodules.batches import TokenBatch
from datamodules.messages import Message
from lightning_modules.forward.completions import CompletionTokens
from lightning_modules.generation.sampler import Samples
from lightning_modules.rewards.base import Reward, checked_scores

ROWS_LOGGED = 8
TABLE = ("step", "prompt", "completion", "score")


class Rollout(NamedTuple):
    """Scored samples of one batch of prompts, kept for further updates; a prompt's samples are neighbours."""

    tokens: TokenBatch
    old_log_probs: Float[Tensor, "prompt sample"]
    advantages: Float[Tensor, "prompt sample"]


def seeds_of(words: Sequence[object], *, count: int) -> list[int]:
    """A seed for each sample; the same for the same words."""
    stream = random.Random("-".join(map(str, words)))
    return [stream.getrandbits(63) for _ in range(count)]


def score_samples(
    reward: Reward, prompts: Sequence[Sequence[Message]], samples: Samples, tokenizer: PreTrainedTokenizerBase
) -> Float[Tensor, "prompt sample"]:
    """What the reward source says of each sample; NaN where it says nothing.

    Args:
        reward: The source.
        prompts: Each with as many samples as the others, which are neighbours.
        samples: Of all prompts.
        tokenizer: Of the model that sampled.
    """
    texts = samples.texts(tokenizer)
    count = len(texts) // len(prompts)
    scores = checked_scores(reward, [prompt for prompt in prompts for _ in range(count)], texts)
    return torch.tensor(scores, dtype=torch.float32, device=samples.finished.device).view(-1, count)


def broken(scores: Float[Tensor, "prompt sample"], rewards: Float[Tensor, "prompt sample"]) -> Float[Tensor, " prompt"]:
    """NaN for prompts with a scored sample without a reward, as log-probabilities were none; 0 for all others.

    Added to the loss, so that it is no finite number: the sample would count as one that could not be scored.
    """
    return torch.where((rewards.isnan() & ~scores.isnan()).any(1), torch.nan, 0.0)


def check_advantages(advantages: Float[Tensor, "prompt sample"], reward: Reward) -> None:
    """Of the first batch: something could be scored, and the advantages of a prompt sum to 0, whatever its rewards.

    Raises:
        ConfigurationError: If no sample could be scored.
        RuntimeError: If they sum to something else.
    """
    if advantages.isnan().all():
        reason = getattr(reward, "last_error", "") or "the reward source returned no score"
        raise ConfigurationError(f"no sample of the first batch could be scored: {reason}; change model.reward")
    worst = advantages.nansum(1).abs().max().item()
    scale = advantages.nan_to_num().abs().max().item()
    if worst > 1e-4 * max(1.0, scale):
        raise RuntimeError(f"the advantages of a prompt must sum to 0, got {worst}")


def rollout_metrics(
    samples: Samples,
    scores: Float[Tensor, "prompt sample"],
    rewards: Float[Tensor, "prompt sample"],
    completions: CompletionTokens,
) -> dict[str, Tensor]:
    """Means over the samples: lengths in tokens, entropy and sampler drift in nats per token, the rest as shares.

    Args:
        samples: Of all prompts.
        scores: NaN where there is none; all that is said of scores is then of the others.
        rewards: The scores after penalties.
        completions: What the training forward says of the samples, with entropies.
    """
    assert completions.entropy is not None
    scored = ~scores.isnan()
    spread = scores.nan_to_num(nan=torch.inf).amax(1) - scores.nan_to_num(nan=-torch.inf).amin(1)
    metrics = {"score": scores[scored].mean(), "reward": rewards[scored].mean()} if scored.any() else {}
    return metrics | {
        "sampler_drift": sampler_drift(samples, completions),
        "entropy": completions.entropy.mean(),
        "completion_length": samples.completion_lengths().float().mean(),
        "truncated": (~samples.finished).float().mean(),
        "alike": (spread == 0).float().mean(),
        "unscored": (~scored).float().mean(),
    }


def sampler_drift(samples: Samples, completions: CompletionTokens) -> Float[Tensor, ""]:
    """Mean over tokens of how far apart, in nats, sampler and training forward hold a token's log-probability.

    The loss takes the training forward's: its gradient needs that forward in any case, and the sampler's, from
    a cache and other kernels, are equal to it in exact arithmetic alone. In float32 the drift is rounding, some
    1e-6; in bfloat16 it says how far off-policy the samples are.
    """
    return (samples.log_probs - completions.log_probs.detach()).abs().mean()


def log_completions(
    trainer: Trainer,
    prompts: Sequence[Sequence[Message]],
    samples: Samples,
    scores: Float[Tensor, "prompt sample"],
    tokenizer: PreTrainedTokenizerBase,
    *,
    every_n_steps: int,
) -> None:
    """Log the first samples as a table, now and then, at the beginning of an optimiser step."""
    first_of_step = trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches == 0
    if not (trainer.global_step % every_n_steps == 0 and first_of_step and trainer.is_global_zero):
        return
    asked = [prompt[-1]["content"] for prompt in prompts for _ in range(scores.shape[1])]
    told = zip(asked, samples.texts(tokenizer), scores.flatten().tolist(), strict=True)
    rows = [[trainer.global_step, *row] for row in told][:ROWS_LOGGED]
    for logger in trainer.loggers:
        if hasattr(logger, "log_table"):
            logger.log_table("train/completions", columns=list(TABLE), data=rows)
