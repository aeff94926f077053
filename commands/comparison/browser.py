"""The prompts with every reference's and every run's completion, for the report's browser and for tables."""

from typing import Any

from commands.comparison.runs import PromptKey, Run, prompts_of


def browser_data(runs: list[Run]) -> dict[str, Any]:
    """``columns`` (references first, then runs) and ``examples`` with an answer, or null, for each of them.

    Runs with the same reference and judge share its column. A column's ``judge`` tells which scores may be set
    against each other, and a run's ``reference`` is the position of its reference's column.
    """
    judges = list(dict.fromkeys(run.judge for run in runs))
    columns: list[dict[str, Any]] = [
        {"name": "reference" if len(judges) == 1 else f"reference {place}", "judge": judge[0], "reference": None}
        for place, judge in enumerate(judges, start=1)
    ]
    columns += [{"name": run.name, "judge": run.judge[0], "reference": judges.index(run.judge)} for run in runs]
    examples = [
        {
            "prompt": pair["prompt"],
            "source": pair.get("source"),
            "tokens": pair.get("prompt_tokens"),
            "answers": [reference_answer(runs, judge, key) for judge in judges]
            + [own_answer(run, key) for run in runs],
        }
        for key, pair in prompts_of(runs).items()
    ]
    return {"columns": columns, "examples": examples}


def reference_answer(runs: list[Run], judge: tuple[str | None, str | None], key: PromptKey) -> dict[str, Any] | None:
    """What the reference said, from the first run that has it."""
    for run in runs:
        pair = run.pairs.get(key)
        if pair and run.judge == judge:
            return answer(pair["reference_completion"], pair["reference_reward"], pair.get("reference_tokens"))
    return None


def own_answer(run: Run, key: PromptKey) -> dict[str, Any] | None:
    """What the run's model said."""
    pair = run.pairs.get(key)
    return answer(pair["completion"], pair["reward"], pair.get("completion_tokens")) if pair else None


def answer(text: str, score: float | None, tokens: int | None) -> dict[str, Any]:
    """A completion with its score and its length."""
    return {"text": text, "score": score, "tokens": tokens}
