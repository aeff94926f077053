"""``report.html``: one file with charts, tables and completions side by side, readable without a network."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

if TYPE_CHECKING:
    from commands.compare import Run

COLOURS = ("#3b82c4", "#e08a2e", "#2f9e6e", "#b5509c", "#8a7a3b", "#666f7a")
CURVES = (
    ("train/loss", "Training loss", "loss"),
    ("val/loss", "Validation loss", "loss"),
    ("val/token_accuracy", "SFT: validation token accuracy", "share of tokens"),
    ("train/accuracy", "DPO: pairs ranked right in the training batches", "share of pairs"),
    ("val/accuracy", "DPO: pairs ranked right on held-out data", "share of pairs"),
    ("train/score", "RLOO: score from the training reward", "score"),
    ("train/kl", "RLOO: log-ratio to the reference", "nats per completion"),
    ("train/completion_length", "RLOO: length of the samples", "tokens"),
)


def render_report(runs: "list[Run]", notes: list[str]) -> str:
    """The page; all text from models and data is escaped."""
    from commands.compare import headline_cells

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    evaluated = [run for run in runs if run.headline]
    charts = [win_rate_chart(evaluated)]
    if any(run.epochs for run in runs):
        charts.append(epoch_chart(runs))
    charts += [chart for name, title, unit in CURVES if (chart := curve_chart(runs, name, title, unit))]
    first = evaluated[0].headline
    return environment.get_template("report.html.jinja").render(
        rows=[(run.name, run.method, headline_cells(run.headline)) for run in evaluated],
        notes=notes,
        judge=first["reward_source"],
        reference=first["reference"],
        prompts=first["prompts"],
        charts=[Markup(chart.to_html(full_html=False, include_plotlyjs=False, config=CONFIG)) for chart in charts],
        names=[run.name for run in evaluated],
        examples=side_by_side(evaluated),
        plotly=Markup(get_plotlyjs()),  # the library's own source
    )


CONFIG = {"displayModeBar": False, "responsive": True}


def win_rate_chart(runs: "list[Run]") -> go.Figure:
    """Win rates with their intervals, of the runs that have one."""
    runs = [run for run in runs if run.headline["win_rate"] is not None]
    rates = [100 * run.headline["win_rate"] for run in runs]
    bounds = [run.headline["win_rate_ci"] for run in runs]
    errors = {
        "type": "data",
        "symmetric": False,
        "array": [100 * high - rate for rate, (_, high) in zip(rates, bounds, strict=True)],
        "arrayminus": [rate - 100 * low for rate, (low, _) in zip(rates, bounds, strict=True)],
    }
    names = [run.name for run in runs]
    figure = go.Figure(go.Bar(x=names, y=rates, error_y=errors, marker_color=COLOURS[: len(runs)], width=0.5))
    figure.add_hline(y=50, line_dash="dot", line_color="#888")
    return styled(figure, "Win rate against the reference, 95 % interval", "%").update_yaxes(range=[0, 100])


def epoch_chart(runs: "list[Run]") -> go.Figure:
    """The win rate after each epoch of training."""
    figure = go.Figure()
    for colour, run in zip(COLOURS, runs, strict=False):
        epochs = sorted(epoch for epoch in run.epochs if run.epochs[epoch]["win_rate"] is not None)
        rates = [100 * run.epochs[epoch]["win_rate"] for epoch in epochs]
        if epochs:
            after = [epoch + 1 for epoch in epochs]
            figure.add_scatter(x=after, y=rates, name=run.name, mode="lines+markers", line_color=colour)
    figure.update_xaxes(dtick=1)
    return styled(figure, "Win rate after each epoch", "%", "epoch").update_yaxes(range=[0, 100])


def curve_chart(runs: "list[Run]", metric: str, title: str, unit: str) -> go.Figure | None:
    """A metric by optimiser step, for the runs that logged it; None where that makes no curve."""
    figure = go.Figure()
    for colour, run in zip(COLOURS, runs, strict=False):
        points = run.curves.get(metric, [])
        if points:
            mode = "lines" if len(points) > 1 else "markers"
            steps, values = zip(*points, strict=True)
            figure.add_scatter(x=steps, y=values, name=run.name, mode=mode, line_color=colour, marker_color=colour)
    is_curve = any(trace.mode == "lines" for trace in figure.data)
    return styled(figure, title, unit, "optimiser step") if is_curve else None


def styled(figure: go.Figure, title: str, unit: str, x_title: str = "") -> go.Figure:
    """Without a background of its own, so that it stands on light and dark pages."""
    grid = {"gridcolor": "rgba(128,128,128,0.25)", "zerolinecolor": "rgba(128,128,128,0.4)"}
    return figure.update_layout(
        title={"text": title, "font": {"size": 15}},
        height=320,
        margin={"l": 55, "r": 15, "t": 45, "b": 45},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#808890", "family": "system-ui, sans-serif"},
        showlegend=len(figure.data) > 1 or x_title == "optimiser step",
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1, "xanchor": "right"},
        yaxis={"title": unit, **grid},
        xaxis={"title": x_title, **grid},
    )


def side_by_side(runs: "list[Run]") -> list[dict[str, Any]]:
    """For each prompt that every run answered: the reference's completion and each run's, with scores."""
    by_prompt = [{json_key(pair["prompt"]): pair for pair in run.pairs} for run in runs]
    examples = []
    for key, pair in by_prompt[0].items():
        if all(key in pairs for pairs in by_prompt):
            own = [pairs[key] for pairs in by_prompt]
            examples.append(
                {
                    "prompt": pair["prompt"],
                    "reference": {"text": pair["reference_completion"], "score": pair["reference_reward"]},
                    "answers": [{"text": p["completion"], "score": p["reward"], "outcome": p["outcome"]} for p in own],
                }
            )
    return examples


def json_key(prompt: list[dict[str, str]]) -> tuple[tuple[str, str], ...]:
    """A prompt as something to look it up by."""
    return tuple((message["role"], message["content"]) for message in prompt)
