"""From the figures of all rounds to tables."""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

Result = dict[str, Any]


def speed(result: Result) -> float:
    """Units a second."""
    return float(result["units"] / result["seconds"])


def share_of_matmul(result: Result) -> float:
    """The operations a second that were necessary, as a share of what a large product reaches."""
    return float(result["flops"] / result["seconds"] / result["matmul_flops"])


def comparison(results: Sequence[Result]) -> str:
    """A line a contestant of one workload; ratios are to TRL's default contestant, round by round."""
    by_name = _by_name(results)
    yardstick = next((own for own in by_name.values() if own[0]["yardstick"]), None)
    workload, unit = results[0]["workload"], results[0]["unit"]
    columns = (workload, f"{unit}/s", "ratio", "peak MiB", "of TRL's", "of matmul", "of bandwidth", "others' cores")
    return _markdown(columns, [[name, *_cells(own, yardstick)] for name, own in by_name.items()])


def _cells(own: list[Result], yardstick: list[Result] | None) -> list[str]:
    memory = median(r["peak_mib"] for r in own)
    ratio = share = ""
    if yardstick is not None:
        ratio = spread(
            [speed(mine) / speed(other) for mine, other in zip(own, yardstick, strict=False)], 2
        )  # a round may be cut
        share = f"{memory / median(r['peak_mib'] for r in yardstick):.2f}"
    bandwidth = median(r["decode_bytes"] / r["memory_bytes"] / r["seconds"] for r in own)
    return [
        spread([speed(r) for r in own], 1),
        ratio if own is not yardstick else "1",
        f"{memory:,.0f}",
        share,
        f"{median(share_of_matmul(r) for r in own):.0%}",
        f"{bandwidth:.0%}" if bandwidth else "",
        spread([r["foreign_cores"] for r in own], 2),
    ]


def growth(axis: str, results: Sequence[Result]) -> str:
    """How the cost of a step grows along an axis: an exponent of 1 is in proportion, 0 is for nothing.

    Args:
        axis: The field of a size that grows, or ``processes``.
        results: Of all rounds, all contestants and all values on the axis.
    """
    lines = []
    for name, own in _by_name(results).items():
        before: tuple[float, float] | None = None
        for value in dict.fromkeys(r[axis] for r in own):
            here = [r for r in own if r[axis] == value]
            seconds = median(r["seconds"] for r in here)
            exponent = f"{math.log(seconds / before[1]) / math.log(value / before[0]):.2f}" if before else ""
            memory, matmul = median(r["peak_mib"] for r in here), median(map(share_of_matmul, here))
            rate = median(map(speed, here))
            lines.append(
                [name, f"{value:,}", f"{seconds:.2f}", exponent, f"{rate:,.1f}", f"{memory:,.0f}", f"{matmul:.0%}"]
            )
            before = (value, seconds)
    unit = results[0]["unit"]
    return _markdown((results[0]["workload"], axis, "s/step", "exponent", f"{unit}/s", "peak MiB", "of matmul"), lines)


def spread(values: Sequence[float], digits: int) -> str:
    """The median, and the range in brackets."""
    low, middle, high = (f"{value:,.{digits}f}" for value in (min(values), median(values), max(values)))
    return f"{middle} ({low} to {high})" if low != high else middle


def _by_name(results: Sequence[Result]) -> dict[str, list[Result]]:
    names = dict.fromkeys(result["name"] for result in results)
    return {name: [result for result in results if result["name"] == name] for name in names}


def _markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
