"""The files of a run's folder as they may be after a kill, a full disk or a stranger: what can be used of them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.text import encodable, printable

NUMBERS = (
    "win_rate",
    "average_reward",
    "average_reference_reward",
    "reward_improvement",
    "length_ratio",
    "length_controlled_win_rate",
)
BOUNDS = ("win_rate_ci", "reward_improvement_ci")
COUNTS = ("wins", "ties", "losses", "failed", "prompts")
NAMES = ("reward_source", "reference")
OUTCOMES = ("win", "tie", "loss", "failed")


class Reader:
    """Reads files and notes what it passes over.

    Args:
        run: What to call the run in a note.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self.notes: list[str] = []

    def note(self, path: Path, what: str) -> None:
        """Note that something of a file is not used."""
        self.notes.append(f"{self.run}: {printable(path.name)} of {printable(path.parent.name)} {what}")

    def text(self, path: Path) -> str:
        """A file's text; nothing where there is none."""
        try:
            return path.read_text("utf-8", errors="replace") if path.is_file() else ""
        except OSError as error:
            self.note(path, f"cannot be read ({error.strerror})")
            return ""

    def mapping(self, path: Path) -> dict[str, Any]:
        """The object in a JSON file; empty where there is none."""
        text = self.text(path)
        content = loaded(text)
        if text and not isinstance(content, dict):
            self.note(path, "is no JSON object and not used")
        return content if isinstance(content, dict) else {}

    def metrics(self, path: Path) -> dict[str, Any]:
        """An evaluation's metrics; empty where they lack what every evaluation has."""
        content = self.mapping(path)
        if content and (lacking := flaw_of_metrics(content)):
            self.note(path, f"is no evaluation ({lacking}) and not used")
            return {}
        kept = {name: value for name, value in content.items() if name not in OPTIONAL or OPTIONAL[name](value)}
        return {name: printable(value) if isinstance(value, str) else value for name, value in kept.items()}

    def lines(self, path: Path, usable: Callable[[Any], bool]) -> list[dict[str, Any]]:
        """The usable lines of a file of JSON lines."""
        found = [loaded(line) for line in self.text(path).splitlines() if line.strip()]
        good = [line for line in found if isinstance(line, dict) and usable(line)]
        if len(good) < len(found):
            self.note(path, f"has {len(found) - len(good)} broken lines of {len(found)}, which are not used")
        return good


def loaded(text: str) -> Any:
    """JSON as plain values: null for what is no finite number, and no text that cannot be written again."""
    try:
        content = json.loads(text, parse_int=whole, parse_float=finite, parse_constant=lambda name: None)
        return clean(content)
    except (ValueError, RecursionError):
        return None


def whole(text: str) -> int | None:
    """An integer, unless no file of ours has one so large."""
    return int(text) if len(text) <= 18 else None


def finite(text: str) -> float | None:
    """A number, if it is finite."""
    value = float(text)
    return value if math.isfinite(value) else None


def clean(value: Any) -> Any:
    """The value with text that can be encoded."""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, list):
        return [clean(item) for item in value]
    if isinstance(value, dict):
        return {encodable(name): clean(item) for name, item in value.items()}
    return value


def is_number(value: Any) -> bool:
    """Whether there is a value; null and NaN stand for none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_number_or_none(value: Any) -> bool:
    """Whether it is a number or stands for none."""
    return value is None or is_number(value)


def is_count(value: Any) -> bool:
    """Whether it counts something."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_interval(value: Any) -> bool:
    """Whether it is two bounds."""
    return isinstance(value, list) and len(value) == 2 and all(map(is_number_or_none, value))


def is_breakdown(value: Any) -> bool:
    """Whether it is a win rate for each group of prompts."""
    return isinstance(value, list) and all(
        isinstance(group, dict)
        and isinstance(group.get("label"), str)
        and is_number_or_none(group.get("win_rate"))
        and is_interval(group.get("win_rate_ci"))
        and is_count(group.get("prompts"))
        for group in value
    )


def are_calls(value: Any) -> bool:
    """Whether it says what became of the requests."""
    reasons = value.get("reasons", {}) if isinstance(value, dict) else None
    counts = [*reasons.values()] if isinstance(reasons, dict) else [None]
    return all(map(is_count, counts)) and all(is_count(value.get(name, 0)) for name in ("asked", "cached", "requests"))


OPTIONAL: dict[str, Callable[[Any], bool]] = {
    "length_controlled_win_rate_ci": is_interval,
    "length_controlled_note": lambda value: isinstance(value, str),
    "sign_test_p": is_number_or_none,
    "reward_length_correlation": is_number_or_none,
    "win_rate_by_prompt_length": is_breakdown,
    "win_rate_by_source": is_breakdown,
    "calls": are_calls,
    "model": lambda value: isinstance(value, str),
    "model_digest": lambda value: isinstance(value, str),
    "valid": lambda value: isinstance(value, bool),
}
"""What not every evaluation has; passed over where it is something else than it should be."""


def flaw_of_metrics(content: dict[str, Any]) -> str:
    """Which part of an evaluation is missing or is something else; empty where all are well."""
    checks: list[tuple[tuple[str, ...], Callable[[Any], bool]]] = [
        (NUMBERS, is_number_or_none),
        (BOUNDS, is_interval),
        (COUNTS, is_count),
        (NAMES, lambda value: isinstance(value, str)),
    ]
    for names, fits in checks:
        for name in names:
            if name not in content or not fits(content[name]):
                return f"{name} is {'not there' if name not in content else 'something else'}"
    return ""


def is_pair(row: dict[str, Any]) -> bool:
    """Whether a line of ``pairs.jsonl`` has a prompt, both completions and what was found of them."""
    prompt = row.get("prompt")
    turns = prompt if isinstance(prompt, list) else []
    texts = [row.get("completion"), row.get("reference_completion")]
    texts += [turn.get(name) if isinstance(turn, dict) else None for turn in turns for name in ("role", "content")]
    return (
        bool(turns)
        and all(isinstance(text, str) for text in texts)
        and all(is_number_or_none(row.get(name)) for name in ("reward", "reference_reward"))
        and all(
            row.get(name) is None or is_count(row[name])
            for name in ("completion_tokens", "reference_tokens", "prompt_tokens")
        )
        and isinstance(row.get("source"), (str, type(None)))
        and row.get("outcome", "failed") in OUTCOMES
    )


def is_record(line: dict[str, Any]) -> bool:
    """Whether a line of ``metrics.jsonl`` has a step."""
    return line.get("step") is None or is_count(line["step"])
