"""Scores of an evaluation: from the cache where they are kept, else from the source, kept as they arrive."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from callbacks.evaluation.cache import EvaluationCache, ScoreMemory, cache_key
from core.secrets import redact
from datamodules.messages import Message
from lightning_modules.rewards import Reward, WeightedReward
from lightning_modules.rewards.base import checked_scores, reward_identity
from lightning_modules.rewards.http import HTTPReward
from lightning_modules.rewards.preflight import remote_parts

CHUNK = 32
"""Completions that a source without a stream of its own is asked about at once, and at a kill may be asked again."""


class Scorer:
    """Asks a reward source for what the cache does not hold, once for the same conversation.

    Args:
        reward: The source.
        cache: Where its scores are kept.
        memory: Where scores of a source that cannot be told from others are kept, for this process alone.
        progress: From how many completions are to be scored to a bar that is told of each that has got its score, or
            will get none.
    """

    def __init__(
        self,
        reward: Reward,
        cache: EvaluationCache,
        memory: ScoreMemory,
        progress: Callable[[int], Any] = lambda total: tqdm(total=total, disable=True),
    ) -> None:
        self.reward = reward
        self.cache = cache
        self.memory = memory
        self._progress = progress
        self._asked: Counter[str] = Counter()
        self._before = self._requests()
        self._raised = ""

    def __call__(self, prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
        """The scores, NaN where the source gives none."""
        with self._progress(len(completions)) as bar:
            return self._scores(self.reward, prompts, completions, bar.update)

    @property
    def counted(self) -> Counter[str]:
        """Conversations ``asked`` about and ``cached`` from before, ``requests``, and failed ones by what failed."""
        return self._asked + self._requests() - self._before

    @property
    def error(self) -> str:
        """Why a score is missing, if one is: what the source raised, or what it last met with."""
        return self._raised or getattr(self.reward, "last_error", "")

    def _requests(self) -> Counter[str]:
        return sum((source.calls for source in remote_parts(self.reward)), Counter())

    def _scores(
        self,
        reward: Reward,
        prompts: Sequence[Sequence[Message]],
        completions: Sequence[str],
        on_score: Callable[[int], object],
    ) -> list[float]:
        if isinstance(reward, WeightedReward):
            return reward.combined([self._scores(part, prompts, completions, on_score) for part in reward.rewards])
        identity = reward_identity(reward)
        kept: EvaluationCache | ScoreMemory = self.memory if identity is None else self.cache
        keys = [cache_key(identity or id(reward), list(p), text) for p, text in zip(prompts, completions, strict=True)]
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        scores = {key: math.nan if (score := kept.score(key)) is None else score for key in first}
        missing = [key for key in dict.fromkeys(keys) if math.isnan(scores[key])]
        self._asked.update(asked=len(missing), cached=len(scores) - len(missing))
        on_score(len(keys) - len(missing))
        rows = [first[key] for key in missing]
        try:
            for position, score in stream(reward, [prompts[i] for i in rows], [completions[i] for i in rows]):
                scores[missing[position]] = score
                if not math.isnan(score):
                    kept.keep_score(missing[position], score)
                on_score(1)
        except Exception as error:
            # An epoch without an evaluation must not end a training, and what is raised may quote a key.
            self._raised = redact(f"{type(error).__name__}: {error}")
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
