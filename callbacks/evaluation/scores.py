"""Scores of an evaluation: from the cache where they are kept, else from the source, kept as they arrive."""

import math
from collections.abc import Callable, Iterator, Sequence

from callbacks.evaluation.cache import EvaluationCache, ScoreMemory, cache_key
from core.secrets import redact
from datamodules.chat import Message
from lightning_modules.rewards import Reward, WeightedReward
from lightning_modules.rewards.base import checked_scores, reward_identity
from lightning_modules.rewards.http import HTTPReward

CHUNK = 32
"""Completions that a source without a stream of its own is asked about at once, and at a kill may be asked again."""


class Scorer:
    """Asks a reward source for what the cache does not hold, once for the same conversation.

    Args:
        reward: The source.
        cache: Where its scores are kept.
        memory: Where scores of a source that cannot be told from others are kept, for this process alone.
        on_score: Called for each completion that has got its score, or will get none.
    """

    def __init__(
        self,
        reward: Reward,
        cache: EvaluationCache,
        memory: ScoreMemory,
        on_score: Callable[[int], object] = lambda count: None,
    ) -> None:
        self.reward = reward
        self.cache = cache
        self.memory = memory
        self.on_score = on_score
        self.asked = 0
        """Conversations that the source was asked about."""
        self.cached = 0
        """Conversations whose score was kept from before."""
        self.error = ""
        """What the source raised, if it did; the rest is then without a score."""

    def __call__(self, prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
        """The scores, NaN where the source gives none."""
        return self._scores(self.reward, prompts, completions)

    def _scores(self, reward: Reward, prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
        if isinstance(reward, WeightedReward):
            return reward.combined([self._scores(part, prompts, completions) for part in reward.rewards])
        identity = reward_identity(reward)
        kept: EvaluationCache | ScoreMemory = self.memory if identity is None else self.cache
        keys = [cache_key(identity or id(reward), list(p), text) for p, text in zip(prompts, completions, strict=True)]
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        scores = {key: math.nan if (score := kept.score(key)) is None else score for key in first}
        missing = [key for key in dict.fromkeys(keys) if math.isnan(scores[key])]
        self.asked += len(missing)
        self.cached += len(scores) - len(missing)
        self.on_score(len(keys) - len(missing))
        rows = [first[key] for key in missing]
        try:
            for position, score in stream(reward, [prompts[i] for i in rows], [completions[i] for i in rows]):
                scores[missing[position]] = score
                if not math.isnan(score):
                    kept.keep_score(missing[position], score)
                self.on_score(1)
        except Exception as error:
            # An epoch without an evaluation must not end a training, and what is raised may quote a key.
            self.error = redact(f"{type(error).__name__}: {error}")
        return [scores[key] for key in keys]


def stream(
    reward: Reward, prompts: Sequence[Sequence[Message]], completions: Sequence[str]
) -> Iterator[tuple[int, float]]:
    """Each completion's position and score, as the source gives them."""
    if isinstance(reward, HTTPReward):
        yield from reward.stream(prompts, completions)
    else:
        for start in range(0, len(completions), CHUNK):
            part = slice(start, start + CHUNK)
            yield from enumerate(checked_scores(reward, prompts[part], completions[part]), start)
