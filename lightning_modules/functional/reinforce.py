"""REINFORCE leave-one-out: rewards, advantages and policy-gradient losses; rows are prompts, columns their samples."""

import torch
from jaxtyping import Float
from torch import Tensor


def kl_penalised_rewards(
    scores: Float[Tensor, "prompt sample"], log_ratios: Float[Tensor, "prompt sample"], *, beta: float
) -> Float[Tensor, "prompt sample"]:
    """Score minus beta times the completion's log-ratio; a NaN score stays NaN.

    Args:
        scores: What the reward source returned; NaN where it returned nothing.
        log_ratios: log pi(y|x) - log pi_ref(y|x) in nats, summed over the completion (the k1 estimator of the KL).
        beta: Strength of the penalty.

    References:
        Ahmadian et al. 2024, eq. 2, https://arxiv.org/abs/2402.14740
    """
    return scores - beta * log_ratios


def leave_one_out_advantages(rewards: Float[Tensor, "prompt sample"]) -> Float[Tensor, "prompt sample"]:
    """Reward minus the mean reward of the prompt's other scored samples.

    Written as n / (n - 1) times the distance from the mean of the n scored samples, which is the same number and
    sums to zero over them. NaN where there is no advantage: for an unscored sample, and for the only scored one.

    Args:
        rewards: Scores after the KL penalty; NaN marks a sample that could not be scored.

    Raises:
        ValueError: If a prompt has fewer than two samples.

    References:
        Ahmadian et al. 2024, eq. 8, https://arxiv.org/abs/2402.14740
    """
    if rewards.shape[1] < 2:
        raise ValueError(
            f"leave-one-out needs at least 2 samples per prompt, got {rewards.shape[1]}; raise model.samples_per_prompt"
        )
    scored = ~rewards.isnan()
    count = scored.sum(1, keepdim=True)
    mean = torch.where(scored, rewards, 0.0).sum(1, keepdim=True) / count.clamp(min=1)
    return torch.where(scored & (count > 1), (rewards - mean) * count / (count - 1).clamp(min=1), torch.nan)


def policy_gradient_loss(
    log_probs: Float[Tensor, "prompt sample"], advantages: Float[Tensor, "prompt sample"]
) -> Float[Tensor, " prompt"]:
    """REINFORCE loss of each prompt, -(1/k) sum_i A_i log pi(y_i|x), with the advantages held constant.

    Args:
        log_probs: Log-probability of each whole completion, summed over its tokens, in nats.
        advantages: From :func:`leave_one_out_advantages`; a sample without one is left out of the mean.

    References:
        Ahmadian et al. 2024, eq. 8, https://arxiv.org/abs/2402.14740
    """
    scored = ~advantages.isnan()
    constant = torch.where(scored, advantages, 0.0).detach()
    return -(constant * log_probs).sum(1) / scored.sum(1).clamp(min=1)


def clipped_policy_gradient_loss(
    log_probs: Float[Tensor, "prompt sample"],
    old_log_probs: Float[Tensor, "prompt sample"],
    advantages: Float[Tensor, "prompt sample"],
    *,
    clip_range: float,
) -> Float[Tensor, " prompt"]:
    """PPO's clipped surrogate with the whole completion as one action, for more than one update per rollout.

    Where the policy is still the one that sampled, its gradient is that of :func:`policy_gradient_loss`.

    Args:
        log_probs: Log-probability of each whole completion under the policy, in nats.
        old_log_probs: The same under the policy that sampled it.
        advantages: From :func:`leave_one_out_advantages`.
        clip_range: The ratio is held within 1 - clip_range .. 1 + clip_range.

    References:
        Schulman et al. 2017, eq. 7, https://arxiv.org/abs/1707.06347
    """
    ratios = (log_probs - old_log_probs.detach()).clamp(-20, 20).exp()  # infinity times an advantage of 0 is NaN
    clipped = ratios.clamp(1 - clip_range, 1 + clip_range)
    scored = ~advantages.isnan()
    constant = torch.where(scored, advantages, 0.0).detach()
    return -torch.minimum(ratios * constant, clipped * constant).sum(1) / scored.sum(1).clamp(min=1)
