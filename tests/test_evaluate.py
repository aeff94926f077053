"""The evaluation as a function: from prompts, two completers and a scorer to a result, on any number of processes."""

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from callbacks.evaluation.cache import EvaluationCache, ScoreMemory
from callbacks.evaluation.evaluate import Evaluation, evaluate
from callbacks.evaluation.metrics import Side
from callbacks.evaluation.result import FIGURES, LOGGED, Calls, EvaluationResult
from callbacks.evaluation.scores import Scorer
from core.ranks import Ranks
from datamodules.messages import Message
from datamodules.prompts import Prompt
from lightning_modules.rewards.rules import brevity
from tests.evaluation_run import result_of

PROMPTS = [Prompt([{"role": "user", "content": f"q{number}"}], tokens=number + 1, source=None) for number in range(5)]


def completer(word: str, seen: list[list[int]]) -> Callable[[Mapping[int, list[Message]]], list[Side]]:
    """Repeats the word once more for each later prompt."""

    def complete(prompts: Mapping[int, list[Message]]) -> list[Side]:
        seen.append(list(prompts))
        return [Side(word * (number + 1), number + 1) for number in prompts]

    return complete


class OneOf(Ranks[Any]):
    """One of several processes, and what it alone has."""

    def __init__(self, rank: int, count: int) -> None:
        super().__init__(1.0)
        self.rank, self.count = rank, count


def run_on(ranks: Ranks[Any], cache: EvaluationCache, seen: list[list[int]]) -> Evaluation:
    scorer = Scorer(brevity, cache, ScoreMemory())
    models = completer("a", seen), completer("bb", seen)
    return evaluate(PROMPTS, *models, scorer=scorer, ranks=ranks, reward_source="brevity", reference="base")


def test_each_process_completes_and_asks_about_its_own_prompts_alone(tmp_path: Path) -> None:
    seen: list[list[int]] = []
    with contextlib.closing(EvaluationCache(tmp_path / "cache.sqlite")) as cache:
        parts = [run_on(OneOf(rank, 2), cache, seen) for rank in range(2)]
        whole = run_on(Ranks(1.0), cache, [])
    assert seen == [[0, 2, 4], [0, 2, 4], [1, 3], [1, 3]]
    assert [part.result.prompts for part in parts] == [3, 2]
    assert [part.result.calls for part in parts] == [Calls(asked=6), Calls(asked=4)]
    assert sorted(pair.prompt_tokens for part in parts for pair in part.pairs) == [1, 2, 3, 4, 5]
    assert whole.result.calls == Calls(cached=10), "what one process has paid for is there for the others"


def test_each_side_gets_its_own_scores(tmp_path: Path) -> None:
    """The policy's answers are half as long, and brevity likes them better."""
    with contextlib.closing(EvaluationCache(tmp_path / "cache.sqlite")) as cache:
        found = run_on(Ranks(1.0), cache, [])
    assert [(pair.completion, pair.reference_completion) for pair in found.pairs[:2]] == [("a", "bb"), ("aa", "bbbb")]
    assert all(pair.reward > pair.reference_reward for pair in found.pairs)
    assert (found.result.win_rate, found.result.wins, found.result.valid) == (1.0, 5, True)
    assert found.reasons == []


def test_what_is_logged_is_what_may_be_monitored() -> None:
    result = result_of([])
    assert set(result.logged()) == LOGGED
    assert {"eval/win_rate", "eval/win_rate_low", "eval/reward_improvement_high", "eval/failed"} <= LOGGED
    assert "eval/average_reward_low" not in LOGGED


def test_an_evaluation_that_is_not_valid_logs_its_counts_alone() -> None:
    result = dataclasses.replace(result_of([]), win_rate=0.9, average_reward=3.0, failed=7, valid=False)
    numbers = result.logged()
    assert (numbers["eval/failed"], numbers["eval/valid"]) == (7.0, 0.0)
    assert math.isnan(numbers["eval/win_rate"])
    assert math.isnan(numbers["eval/average_reward"])
    assert dataclasses.replace(result, valid=True).logged()["eval/win_rate"] == 0.9


@pytest.mark.parametrize("name", ["win_rate", "length_controlled_win_rate", "average_reward", "reward_improvement"])
def test_figures_that_a_checkpoint_is_chosen_by_know_their_direction(name: str) -> None:
    assert FIGURES[name].higher_is_better
    assert not FIGURES["length_ratio"].higher_is_better


def test_calls_tell_failures_by_their_reason() -> None:
    counted: Counter[str] = Counter(asked=3, requests=5, timeout=1)
    counted["429"] = 2
    assert Calls.of(counted) == Calls(asked=3, requests=5, failed_requests=3, reasons={"429": 2, "timeout": 1})


def test_a_record_has_null_for_what_has_no_value() -> None:
    record = result_of([]).record()
    assert (record["win_rate"], record["win_rate_ci"], record["prompts"]) == (None, [None, None], 0)
    assert list(record) == [field.name for field in dataclasses.fields(EvaluationResult)]
