"""The demo's judge: how close a completion is to the right answer, on a scale like Nemotron's."""

import math
from collections.abc import Sequence
from difflib import SequenceMatcher

from datamodules.messages import Message
from demo.tasks import right_answer

WORST, BEST = -20.0, 5.0


def judge(prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
    """5 for the right answer, down to -20 for one that shares nothing with it; NaN for a prompt of another kind.

    Closeness is the Ratcliff-Obershelp measure, 2 M / T, averaged over words and characters.
    """
    return [_score(prompt[-1]["content"], text) for prompt, text in zip(prompts, completions, strict=True)]


def _score(prompt: str, completion: str) -> float:
    answer = right_answer(prompt)
    if answer is None:
        return math.nan
    closeness = [_ratio(completion.split(), answer.split()), _ratio(completion, answer)]
    return WORST + (BEST - WORST) * sum(closeness) / 2


def _ratio(first: Sequence[str], second: Sequence[str]) -> float:
    return SequenceMatcher(None, first, second, autojunk=False).ratio()
