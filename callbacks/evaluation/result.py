"""What an evaluation finds: its figures, with what each measures, and the record that files, loggers and reports read.

A new figure is a field here and its value in ``metrics.py``; it is then in ``metrics.json``, in the loggers, and, if it
is ``tabled``, in the tables of ``compare`` and of W&B.
"""

import dataclasses
import math
from collections import Counter
from enum import Enum
from typing import Any, NamedTuple

from core.files import without_nan
from lightning_modules.functional.statistics import Interval

UNKNOWN = Interval(math.nan, math.nan)
CI = "_ci"
"""Ends the name of a figure's interval: two bounds at 95 %."""


class Unit(Enum):
    """What a figure is a number of."""

    SHARE = "share in 0..1"
    SCORE = "score of the reward source"
    RATIO = "ratio"
    PROBABILITY = "p value"
    CORRELATION = "rank correlation in -1..1"
    PROMPTS = "prompts"
    YES_OR_NO = "1 or 0"


class Figure(NamedTuple):
    """What is known of a figure apart from its value."""

    unit: Unit
    title: str = ""
    """In tables; those that have one are tabled."""
    higher_is_better: bool = False
    counts: bool = False
    """Whether it counts what was scored, and so holds for an evaluation that is not valid."""


def figure(unit: Unit, title: str = "", *, default: Any = dataclasses.MISSING, **known: bool) -> Any:
    """A field that holds a figure; one with a default may be missing from a file."""
    return dataclasses.field(default=default, metadata={"figure": Figure(unit, title, **known)})


@dataclasses.dataclass(frozen=True)
class Group:
    """The win rate on a part of the prompts."""

    label: str
    prompts: int
    win_rate: float
    win_rate_ci: Interval


@dataclasses.dataclass(frozen=True)
class Calls:
    """How many conversations were asked about or known, and what became of the requests."""

    asked: int = 0
    cached: int = 0
    requests: int = 0
    failed_requests: int = 0
    reasons: dict[str, int] = dataclasses.field(default_factory=dict)
    """Why requests failed, with how many did."""

    @classmethod
    def of(cls, counted: Counter[str]) -> "Calls":
        """From counts of conversations (``asked``, ``cached``), of ``requests``, and of failures by their reason."""
        known = {name: counted[name] for name in ("asked", "cached", "requests")}
        reasons = {name: count for name, count in sorted(counted.items()) if name not in known}
        return cls(**known, failed_requests=sum(reasons.values()), reasons=reasons)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """The figures of an evaluation, NaN where the pairs tell none, and what was evaluated. Failed pairs are in none."""

    win_rate: float = figure(Unit.SHARE, "win rate", higher_is_better=True)
    win_rate_ci: Interval
    sign_test_p: float = figure(Unit.PROBABILITY, "p", default=math.nan)
    length_controlled_win_rate: float = figure(Unit.SHARE, "at equal length", higher_is_better=True)
    length_controlled_win_rate_ci: Interval = UNKNOWN
    length_controlled_note: str | None = None
    """Why the win rate at equal length is not known, where it is not."""
    average_reward: float = figure(Unit.SCORE, "reward", higher_is_better=True)
    average_reference_reward: float = figure(Unit.SCORE, "reference")
    reward_improvement: float = figure(Unit.SCORE, "improvement", higher_is_better=True)
    reward_improvement_ci: Interval
    length_ratio: float = figure(Unit.RATIO, "length ratio")
    reward_length_correlation: float = figure(Unit.CORRELATION, "length correlation", default=math.nan)
    wins: int = figure(Unit.PROMPTS, counts=True)
    ties: int = figure(Unit.PROMPTS, counts=True)
    losses: int = figure(Unit.PROMPTS, counts=True)
    failed: int = figure(Unit.PROMPTS, counts=True)
    prompts: int = figure(Unit.PROMPTS, counts=True)
    prompts_needed: int | None = figure(Unit.PROMPTS, default=None)
    """How many would tell this win rate from one half; None where no number would."""
    win_rate_by_prompt_length: list[Group] = dataclasses.field(default_factory=list)
    win_rate_by_source: list[Group] = dataclasses.field(default_factory=list)
    valid: bool = figure(Unit.YES_OR_NO, counts=True, default=True)
    """Whether few enough pairs failed."""
    model: str | None = None
    """What was evaluated, in words."""
    model_digest: str | None = None
    """Of its weights."""
    reward_source: str
    reference: str
    calls: Calls | None = None

    @property
    def scored(self) -> int:
        """Pairs that have an outcome."""
        return self.wins + self.ties + self.losses

    def interval(self, name: str) -> Interval | None:
        """The interval of a figure; None where it has none."""
        return getattr(self, name + CI, None)

    def record(self) -> dict[str, Any]:
        """As JSON takes it; what has no value is null."""
        return without_nan(dataclasses.asdict(self))  # type: ignore[no-any-return]

    def logged(self) -> dict[str, float]:
        """The figures under ``eval/``; where it is not valid the counts alone, and NaN for the rest."""
        numbers: dict[str, float] = {}
        for name, known in FIGURES.items():
            value = getattr(self, name)
            bounds = self.interval(name)
            found = {name: math.nan if value is None else float(value)}
            if bounds is not None:
                found |= {f"{name}_low": bounds.low, f"{name}_high": bounds.high}
            tells = self.valid or known.counts
            numbers |= {f"eval/{each}": number if tells else math.nan for each, number in found.items()}
        return numbers


FIELDS = {field.name: field for field in dataclasses.fields(EvaluationResult)}
FIGURES: dict[str, Figure] = {
    name: field.metadata["figure"] for name, field in FIELDS.items() if "figure" in field.metadata
}
"""By name, in the order of tables."""
TABLED = {name: known for name, known in FIGURES.items() if known.title}
LOGGED = {f"eval/{name}" for name in FIGURES} | {
    f"eval/{name}_{bound}" for name in FIGURES if name + CI in FIELDS for bound in Interval._fields
}
"""The names of all that an evaluation logs."""
