"""From the figures of all rounds to a table."""

from statistics import median
from typing import Any

HEADER = """\
| {workload}{label} | {unit}/s, median (range) | ratio by round, median (range) | peak MiB | of TRL's | GFLOP/s | of matmul | others' cores |
|---|---|---|---|---|---|---|---|"""

Result = dict[str, Any]


def speed(result: Result) -> float:
    """Units a second."""
    return float(result["units"] / result["seconds"])


def spread(values: list[float], digits: int) -> str:
    """The median, and the range in brackets."""
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def table(workload: str, results: list[Result], *, label: str = "") -> str:
    """A Markdown table of one workload, a line a contestant; ratios are to the last default contestant, TRL's.

    Args:
        workload: Its name.
        results: What :func:`benchmarks.run.measure` returns, one for each contestant and round.
        label: What is special about these rows.
    """
    names = list(dict.fromkeys(result["name"] for result in results))
    by_name = {name: [result for result in results if result["name"] == name] for name in names}
    yardstick = by_name[next((r["name"] for r in results if r["yardstick"]), names[0])]
    lines = [HEADER.format(workload=workload, label=label, unit=results[0]["unit"])]
    for name in names:
        own = by_name[name]
        ratios = [speed(mine) / speed(other) for mine, other in zip(own, yardstick, strict=False)]
        memory = median(r["peak_mib"] for r in own)
        cells = [
            name,
            spread([speed(r) for r in own], 1),
            "1" if own is yardstick else spread(ratios, 2),
            f"{memory:,.0f}",
            f"{memory / median(r['peak_mib'] for r in yardstick):.2f}",
            f"{median(r['flops'] / r['seconds'] for r in own) / 1e9:,.1f}",
            f"{median(r['flops'] / r['seconds'] / r['matmul_flops'] for r in own):.1%}",
            f"{median(r['foreign_cores'] for r in own):.2f} (at most {max(r['foreign_cores'] for r in own):.2f})",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *_bandwidth(by_name)])


def _bandwidth(by_name: dict[str, list[Result]]) -> list[str]:
    """For generation alone: how close it is to reading weights and cache as fast as memory can be copied."""
    lines = []
    for name, own in by_name.items():
        if own[0]["decode_bytes"]:
            share = median(r["decode_bytes"] / r["memory_bytes"] / r["seconds"] for r in own)
            lines.append(f"\n{name}: {share:.1%} of the limit that the memory's bandwidth sets.")
    return lines
