"""An evaluation: held-out prompts, completed by two models and scored, and what that tells."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from callbacks.evaluation.metrics import Pair, Side, evaluation_result
from callbacks.evaluation.result import Calls, EvaluationResult
from callbacks.evaluation.scores import Scorer
from core.ranks import Ranks
from datamodules.messages import Message
from datamodules.prompts import Prompt

Complete = Callable[[Mapping[int, list[Message]]], list[Side]]
"""From prompts, by their number in the evaluation, to a completion of each; called by every process."""


class Evaluation(NamedTuple):
    """A result and what it was made of."""

    result: EvaluationResult
    pairs: list[Pair]
    reasons: list[str]
    """Why scores are missing, where some are."""


class Share(NamedTuple):
    """What one process has of an evaluation."""

    pairs: dict[int, Pair]
    """By the number of their prompt."""
    calls: Counter[str]
    error: str


def evaluate(
    prompts: Sequence[Prompt],
    complete: Complete,
    complete_reference: Complete,
    scorer: Scorer,
    ranks: Ranks[Any],
    **about: Any,
) -> Evaluation:
    """Have both models complete the prompts and the scorer score the completions; the same on every process.

    Args:
        prompts: All of them; each process takes its share.
        complete: Completes with the model that is evaluated.
        complete_reference: Completes with the model that it is compared with.
        scorer: Scores completions, NaN where it cannot.
        ranks: The processes of the run.
        **about: What was evaluated and how, for :func:`evaluation_result`.
    """
    mine = {number: prompts[number] for number in range(ranks.rank, len(prompts), ranks.count)}
    messages = {number: prompt.messages for number, prompt in mine.items()}
    sides = complete(messages), complete_reference(messages)
    shares = ranks.gather(lambda: score_share(mine, *sides, scorer))
    by_number = {number: pair for share in shares for number, pair in share.pairs.items()}
    pairs = [by_number[number] for number in sorted(by_number)]
    calls = Calls.of(sum((share.calls for share in shares), Counter()))
    reasons = list(dict.fromkeys(share.error for share in shares if share.error))
    return Evaluation(evaluation_result(pairs, calls=calls, **about), pairs, reasons)


def score_share(
    prompts: Mapping[int, Prompt], policy: Sequence[Side], reference: Sequence[Side], scorer: Scorer
) -> Share:
    """One process's pairs, scored policy first, so that what is scored before a limit is whole pairs."""
    both = list(zip(policy, reference, strict=True))
    asked = [prompt.messages for prompt in prompts.values() for _ in range(2)]
    scores = scorer(asked, [side.completion for sides in both for side in sides])
    scored = zip(scores[::2], scores[1::2], strict=True)
    pairs = {
        number: Pair.of(prompt.messages, *sides, *rewards, prompt_tokens=prompt.tokens, source=prompt.source)
        for (number, prompt), sides, rewards in zip(prompts.items(), both, scored, strict=True)
    }
    missing = any(pair.outcome == "failed" for pair in pairs.values())
    return Share(pairs, scorer.counted, scorer.error if missing else "")
