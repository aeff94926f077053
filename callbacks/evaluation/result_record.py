"""An evaluation's result from its record, as it may be after a kill, a full disk or a stranger."""

import math
from collections.abc import Callable
from dataclasses import MISSING
from typing import Any

from callbacks.evaluation.result import FIELDS, Calls, EvaluationResult, Group
from core.text import printable
from lightning_modules.functional.statistics import Interval


def read_result(content: dict[str, Any]) -> EvaluationResult:
    """A result from its record; of what not every evaluation has, what is something else is passed over.

    Raises:
        ValueError: If a part that every evaluation has is missing or is something else; it says which.
    """
    values = {}
    for name, field in FIELDS.items():
        try:
            values[name] = READ[field.type](content[name])
        except (KeyError, TypeError, ValueError):
            if field.default is MISSING and field.default_factory is MISSING:
                told = "something else" if name in content else "not there"
                raise ValueError(f"{name} is {told}") from None
    return EvaluationResult(**values)


def checked(value: Any, fits: Callable[[Any], bool]) -> Any:
    """The value, or a ValueError where it does not fit."""
    if not fits(value):
        raise ValueError(value)
    return value


def of_type(kind: type) -> Callable[[Any], Any]:
    """From a value to itself, if it is of a type."""
    return lambda value: checked(value, lambda read: isinstance(read, kind))


def number(value: Any) -> float:
    """A number; NaN for null."""
    return math.nan if value is None else float(checked(value, is_number))


def count(value: Any) -> int:
    """A count."""
    return int(checked(value, is_count))


def text(value: Any) -> str:
    """Text, as it may be shown."""
    return printable(of_type(str)(value))


def interval(value: Any) -> Interval:
    """Two bounds."""
    low, high = of_type(list)(value)
    return Interval(number(low), number(high))


def group(value: Any) -> Group:
    """The win rate on a part of the prompts."""
    bounds = interval(value["win_rate_ci"])
    return Group(text(value["label"]), count(value["prompts"]), number(value["win_rate"]), bounds)


def calls(value: Any) -> Calls:
    """What became of the requests."""
    found = of_type(dict)(value)
    counts = {name: count(found.get(name, 0)) for name in ("asked", "cached", "requests", "failed_requests")}
    reasons = of_type(dict)(found.get("reasons", {}))
    return Calls(**counts, reasons={text(reason): count(times) for reason, times in reasons.items()})


def or_none(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same for what may be null."""
    return lambda value: None if value is None else read(value)


def is_number(value: Any) -> bool:
    """Whether there is a value; null and NaN stand for none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any) -> bool:
    """Whether it counts something."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


READ: dict[Any, Callable[[Any], Any]] = {
    float: number,
    int | None: or_none(count),
    int: count,
    bool: of_type(bool),
    str: text,
    str | None: or_none(text),
    Interval: interval,
    list[Group]: lambda value: [group(each) for each in of_type(list)(value)],
    Calls | None: or_none(calls),
}
"""From JSON to a field of each type."""
