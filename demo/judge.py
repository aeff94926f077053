"""The demo's judge: how close a completion is to the right answer, on a scale like Nemotron's."""

import math
from collections.abc import Sequence
from difflib import SequenceMatcher

from datamodules.chat import Message
from demo.tasks import right_answer

WORST, BEST = -20.0, 5.0


def judge(prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
    """5 for the right answer, down to -20 for one that shares nothing with it; NaN for a prompt of another kind.

    The words decide, by the share that can be matched in order: 2 M / T of the Ratcliff-Obershelp measure.
    """
    return [_score(prompt[-1]["content"], text) for prompt, text in zip(prompts, completions, strict=True)]


def _score(prompt: str, completion: str) -> float:
    answer = right_answer(prompt)
    if answer is None:
        return math.nan
    similarity = SequenceMatcher(None, completion.split(), answer.split(), autojunk=False).ratio()
    return WORST + (BEST - WORST) * similarity
