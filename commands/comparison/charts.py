"""The report's charts, without a background of their own, so that they stand on light and dark pages."""

import html
from typing import Any

import plotly.graph_objects as go

from callbacks.evaluation.result import EvaluationResult
from callbacks.evaluation.result_record import is_number
from commands.comparison.runs import Run

COLOURS = ("#3b82c4", "#e08a2e", "#2f9e6e", "#b5509c", "#8a7a3b", "#5b6ee0")
REFERENCE_COLOUR = "#8a94a0"
POINTS_OF_A_CURVE = 500
CURVES = {
    "loss": ("Loss", ""),
    "perplexity": ("Perplexity", ""),
    "token_accuracy": ("Token accuracy", "share of tokens"),
    "accuracy": ("Pairs ranked right", "share of pairs"),
    "margin": ("Margin of chosen over rejected", "reward"),
    "chosen_reward": ("Implicit reward of chosen", "beta times nats"),
    "rejected_reward": ("Implicit reward of rejected", "beta times nats"),
    "score": ("Score from the training reward", "score"),
    "reward": ("Score minus the KL penalty", "reward"),
    "kl": ("Log-ratio to the reference", "nats"),
    "completion_length": ("Length of the samples", "tokens"),
    "truncated": ("Samples cut at the length limit", "share of samples"),
    "entropy": ("Entropy of the policy", "nats per token"),
}
"""Title and unit of what the methods log, in the order shown; other metrics follow under their own names."""


def colours(runs: list[Run]) -> dict[str, str]:
    """Each run's colour, the same in every chart."""
    return {run.name: COLOURS[place % len(COLOURS)] for place, run in enumerate(runs)}


def plain(text: str) -> str:
    """Text as plotly shows it letter by letter; it would otherwise read tags in it."""
    return html.escape(text, quote=False)


def win_rate_chart(runs: list[Run]) -> go.Figure | None:
    """Win rates with their intervals, of the runs that have one."""
    figure = go.Figure()
    for name, colour in colours(runs).items():
        result = next(run.result for run in runs if run.name == name)
        if is_number(result.win_rate):
            figure.add_scatter(
                x=[plain(name)], y=[100 * result.win_rate], error_y=error_bars([result], colour), mode="markers"
            )
            figure.data[-1].update(name=plain(name), marker={"color": colour, "size": 12}, hovertemplate="%{y:.1f} %")
    if not figure.data:
        return None
    figure = rates(figure, "Win rate against the reference").update_layout(showlegend=False)
    return figure.update_xaxes(range=[-0.5, len(figure.data) - 0.5], showgrid=False)


def epoch_chart(runs: list[Run]) -> go.Figure | None:
    """The win rate after each epoch of training, with intervals; hollow where the evaluation is not valid."""
    figure = go.Figure()
    for place, (run, colour) in enumerate(zip(runs, colours(runs).values(), strict=True)):
        found = {epoch: result for epoch, result in sorted(run.epochs.items()) if is_number(result.win_rate)}
        if found:
            beside = 0.07 * (place - (len(runs) - 1) / 2)  # so that intervals do not lie on each other
            figure.add_scatter(
                x=[epoch + 1 + beside for epoch in found],
                y=[100 * result.win_rate for result in found.values()],
                error_y=error_bars(list(found.values()), colour),
                name=plain(run.name),
                mode="lines+markers",
                line_color=colour,
                marker_symbol=["circle" if result.valid else "circle-open" for result in found.values()],
                customdata=[epoch + 1 for epoch in found],
                hovertemplate="after epoch %{customdata}: %{y:.1f} %",
            )
    if not figure.data:
        return None
    last = max(epoch for run in runs for epoch in run.epochs) + 1
    chart = rates(figure, "Win rate after each epoch", "epoch")
    return chart.update_xaxes(range=[0.5, last + 0.5], dtick=max(1, last // 12), showgrid=False)


def rates(figure: go.Figure, title: str, x_title: str = "") -> go.Figure:
    """Win rates in per cent, with a line at one half."""
    figure.add_hline(y=50, line_dash="dot", line_color=REFERENCE_COLOUR)
    return styled(figure, title, "%", x_title).update_yaxes(range=[0, 100])


def error_bars(results: list[EvaluationResult], colour: str) -> dict[str, Any]:
    """The intervals of win rates in per cent."""
    bounds = [(result.win_rate, *result.win_rate_ci) for result in results]
    return {
        "type": "data",
        "symmetric": False,
        "array": [100 * (high - rate) for rate, _, high in bounds],
        "arrayminus": [100 * (rate - low) for rate, low, _ in bounds],
        "color": colour,
    }


def scores_of(runs: list[Run]) -> list[tuple[str, str, list[tuple[float, int | None, str]]]]:
    """Name, colour and (score, tokens, prompt) of each reference and each run."""
    series = []
    for judge in dict.fromkeys(run.judge for run in runs):
        rows = next(list(run.pairs.values()) for run in runs if run.judge == judge)
        series.append(("reference", REFERENCE_COLOUR, rows, "reference_reward", "reference_tokens"))
    for run, colour in zip(runs, colours(runs).values(), strict=True):
        series.append((run.name, colour, list(run.pairs.values()), "reward", "completion_tokens"))
    return [
        (
            plain(name),
            colour,
            [(row[score], row.get(tokens), row["prompt"][-1]["content"]) for row in rows if is_number(row[score])],
        )
        for name, colour, rows, score, tokens in series
    ]


def reward_chart(runs: list[Run]) -> go.Figure | None:
    """How the rewards of each run and of the reference are distributed."""
    figure = go.Figure()
    for name, colour, points in scores_of(runs):
        if points:
            figure.add_violin(
                y=[round(score, 4) for score, _, _ in points],
                name=name,
                line_color=colour,
                box_visible=True,
                meanline_visible=True,
                points=False,
                spanmode="hard",
                hoverinfo="y",
            )
    return styled(figure, "Rewards", "reward").update_layout(showlegend=False) if figure.data else None


def length_chart(runs: list[Run]) -> go.Figure | None:
    """Reward against the completion's length; a point a completion."""
    figure = go.Figure()
    for name, colour, points in scores_of(runs):
        shown = [(score, tokens, prompt) for score, tokens, prompt in points if tokens is not None]
        if shown:
            figure.add_scatter(
                x=[tokens for _, tokens, _ in shown],
                y=[round(score, 4) for score, _, _ in shown],
                text=[plain(" ".join(prompt[:80].split())) for _, _, prompt in shown],
                name=name,
                mode="markers",
                marker={"color": colour, "size": 6, "opacity": 0.6},
                hovertemplate="%{text}<br>%{x} tokens, reward %{y:.2f}",
            )
    return styled(figure, "Reward against length", "reward", "tokens of the completion") if figure.data else None


def curve_charts(run: Run) -> list[go.Figure]:
    """A chart for each metric of the run's training, with its values on training and held-out data."""
    metrics = {name.partition("/")[2] for name in run.curves if name.startswith(("train/", "val/"))}
    known = [name for name in CURVES if name in metrics]
    figures = [curve_chart(run, name) for name in known + sorted(metrics - set(known))]
    return [figure for figure in figures if figure is not None]


def curve_chart(run: Run, metric: str) -> go.Figure | None:
    """A metric by optimiser step; None where that makes no curve."""
    figure = go.Figure()
    stages = (("train", "training", COLOURS[0]), ("val", "held out", COLOURS[1]))
    for stage, name, colour in stages:
        points = thinned(run.curves.get(f"{stage}/{metric}", []))
        if points:
            steps, values = zip(*points, strict=True)
            mode = "lines" if len(points) > 30 else "lines+markers"
            figure.add_scatter(x=steps, y=values, name=name, mode=mode, line={"color": colour, "width": 1.5})
    if not any(len(trace.x) > 1 for trace in figure.data):
        return None
    title, unit = CURVES.get(metric, (metric, ""))
    return styled(figure, title, unit, "optimiser step").update_layout(height=220, showlegend=True)


def thinned(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most ``POINTS_OF_A_CURVE`` points, each the mean of neighbours."""
    size = -(-len(points) // POINTS_OF_A_CURVE) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [tuple(sum(axis) / len(group) for axis in zip(*group, strict=True)) for group in groups]


def styled(figure: go.Figure, title: str, unit: str, x_title: str = "") -> go.Figure:
    """Transparent, with its legend above; the page shows the title and sets the colours of text and grid."""
    return figure.update_layout(
        template="none",
        meta={"title": title},
        height=310,
        margin={"l": 52, "r": 14, "t": 14, "b": 46 if x_title else 28},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12},
        showlegend=len(figure.data) > 1,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "xanchor": "left"},
        hovermode="closest",
        yaxis={"title": {"text": unit, "standoff": 6}},
        xaxis={"title": {"text": x_title, "standoff": 8}},
    )
