"""The files of a run's folder as they may be after a kill, a full disk or a stranger: what can be used of them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from callbacks.evaluation.result import EvaluationResult
from callbacks.evaluation.result_record import is_count, is_number, read_result
from core.text import encodable, printable

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

    def result(self, path: Path) -> EvaluationResult | None:
        """An evaluation's result; None where it lacks what every evaluation has."""
        content = self.mapping(path)
        if not content:
            return None
        try:
            return read_result(content)
        except ValueError as flaw:
            self.note(path, f"is no evaluation ({flaw}) and not used")
            return None

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


def is_number_or_none(value: Any) -> bool:
    """Whether it is a number or stands for none."""
    return value is None or is_number(value)


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
