"""What is asked of a reward source before expensive work: an answer, good judgement, and how long it will take."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from core.errors import ConfigurationError
from core.ranks import Ranks
from datamodules.messages import Message
from datamodules.prompts import Prompt
from lightning_modules.rewards.base import Reward, WeightedReward, checked_scores, reward_name
from lightning_modules.rewards.http import HTTPReward
from lightning_modules.rewards.local import ModelReward

SLACK_S = 3600.0
"""How much longer than its scores another process may take for its completions."""


def preflight(reward: Reward, prompt: Sequence[Message], *, option: str) -> None:
    """Ask for one score.

    Raises:
        ConfigurationError: If the source says why it gives none: a server that is down, a key that is refused.
    """
    score = checked_scores(reward, [prompt], ["I am not sure."])[0]
    reason = getattr(reward, "last_error", "")
    if math.isnan(score) and reason:
        raise ConfigurationError(f"the reward source {reward_name(reward)} does not answer: {reason}; change {option}")


def judge_preflight(reward: Reward, *, option: str) -> None:
    """Ask a reward model to score a clearly good and a clearly bad answer.

    The question differs from one start to the next, so that no cache on the way can answer it.

    Raises:
        ConfigurationError: If it gives no scores, or the bad answer's is not the lower one.
    """
    number = random.SystemRandom().randrange(10, 98)
    prompt = [{"role": "user", "content": f"What is one more than {number}?"}]
    good, bad = f"{number + 1} is one more than {number}.", "No idea."
    good_score, bad_score = checked_scores(reward, [prompt, prompt], [good, bad])
    if math.isnan(good_score) or math.isnan(bad_score):
        reason = getattr(reward, "last_error", "") or "it returned no number"
        raise ConfigurationError(f"the reward source {reward_name(reward)} does not answer: {reason}; change {option}")
    if good_score <= bad_score:
        raise ConfigurationError(
            f"the reward source {reward_name(reward)} scores {good!r} at {good_score:g} and {bad!r} at {bad_score:g}, "
            f"so it cannot tell a good answer to {prompt[0]['content']!r} from a bad one; change {option}, or set "
            "evaluation.check_judge to false if it is made for other questions"
        )


def before_evaluation(
    reward: Reward, prompts: Sequence[Prompt], *, judges: bool, option: str, told: Callable[[str], None]
) -> None:
    """Try the source, and say how long an evaluation takes.

    Args:
        reward: The source.
        prompts: Of the evaluation.
        judges: Whether a reward model must tell a good answer from a bad one.
        option: Names the source in errors.
        told: Is given lines for people.

    Raises:
        ConfigurationError: If the source gives no scores, or cannot judge.
    """
    if judges and is_model(reward):
        judge_preflight(reward, option=option)
    else:
        preflight(reward, prompts[0].messages, option=option)
    for source in remote_parts(reward):
        told(time_plan(source, len(prompts)))


def is_model(reward: Reward) -> bool:
    """Whether the source is a reward model, of which good judgement may be asked; a rule may want anything."""
    return isinstance(reward, (HTTPReward, ModelReward))


def processes_for(reward: Reward) -> Ranks[Any]:
    """The processes of a run, who wait for each other as long as the source may take on one of them."""
    return Ranks(SLACK_S + sum(source.time_limit_s for source in remote_parts(reward)))


def remote_parts(reward: Reward) -> list[HTTPReward]:
    """The sources behind HTTP that a reward is made of."""
    if isinstance(reward, WeightedReward):
        return [part for inner in reward.rewards for part in remote_parts(inner)]
    return [reward] if isinstance(reward, HTTPReward) else []


def time_plan(reward: HTTPReward, prompts: int) -> str:
    """How long the calls of an evaluation take by the source's limits and its last answer, as a sentence or two."""
    calls = 2 * prompts
    by_rate_s = 60.0 * calls / reward.requests_per_minute if reward.requests_per_minute else 0.0
    seconds = max(by_rate_s, calls * reward.answer_s / reward.parallel_requests)
    rate = f" at {reward.requests_per_minute:g} a minute" if reward.requests_per_minute else ""
    plan = (
        f"evaluation: {prompts} prompts x 2 sides = {calls} calls{rate}, about {minutes(seconds)} the first time and "
        f"{minutes(seconds / 2)} for each further epoch, as the reference's scores are kept"
    )
    limits = []
    if seconds > reward.time_limit_s:
        limits.append(f"time_limit_s={reward.time_limit_s:g}")
    if reward.max_calls is not None and calls > reward.max_calls:
        limits.append(f"max_calls={reward.max_calls}")
    if limits:
        plan += (
            f"; that is beyond {' and '.join(limits)}, so what is left then counts as failed, and another evaluation "
            "goes on from there: raise the limit or lower evaluation.num_prompts"
        )
    return plan


def minutes(seconds: float) -> str:
    """A duration for people."""
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{max(1.0, seconds):.0f} s"
