"""``compare``: what it reads, what it computes, what it warns of, and what it hands to W&B."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from callbacks.metrics_file import MetricsFile
from commands import compare as command
from commands.charts import thinned
from commands.compare import compare
from commands.runs import read_curves
from datamodules.errors import ConfigurationError
from lightning_modules.functional.statistics import wilson_interval
from tests.compared_runs import HOSTILE, make_run


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


def summary(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return content


def test_the_headline_is_that_of_the_final_evaluation_else_of_the_last_epoch(tmp_path: Path) -> None:
    final = make_run(tmp_path / "final", rewards=[1.0, 1.0, -1.0, 0.0])
    make_run(final, rewards=[-1.0] * 4, folder="epoch=0")
    epochs = make_run(tmp_path / "epochs", rewards=[-1.0] * 4, folder="epoch=2")
    make_run(epochs, rewards=[1.0] * 4, folder="epoch=10")
    compare([final, epochs], tmp_path / "report")
    runs = summary(tmp_path / "report")["runs"]
    assert (runs["final"]["win_rate"], runs["final"]["from"]) == (2.5 / 4, "final")
    assert (runs["epochs"]["win_rate"], runs["epochs"]["from"]) == (1.0, "epoch=10")


def test_methods_meet_on_the_prompts_that_both_have_a_score_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """a: 5 - 1 is a win, 2 - 2 a tie, 0 - 3 a loss; one prompt is a's alone, one unscored on either side."""
    a = make_run(tmp_path / "a", rewards=[5.0, 2.0, 0.0, 9.0, math.nan, 1.0], prompts=["p", "q", "r", "own", "s", "t"])
    b = make_run(tmp_path / "b", rewards=[3.0, 2.0, 1.0, 1.0, math.nan], prompts=["r", "q", "p", "s", "t"])
    compare([a, b], tmp_path / "report")
    there, back = summary(tmp_path / "report")["pairwise"]
    assert (there["row"], there["column"], there["prompts"]) == ("a", "b", 3)
    assert (there["wins"], there["ties"], there["losses"], there["win_rate"]) == (1, 1, 1, 0.5)
    assert there["win_rate_ci"] == pytest.approx(list(wilson_interval(1.5, 3)))
    assert there["reward_difference"] == pytest.approx((4 + 0 - 3) / 3)
    assert there["reward_difference_ci"][0] < 1 / 3 < there["reward_difference_ci"][1]
    assert back["reward_difference"] == pytest.approx(-there["reward_difference"])
    assert back["win_rate"] == 1 - there["win_rate"]
    assert "+0.33 [" in capsys.readouterr().out


def test_a_prompt_that_comes_twice_is_met_twice(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", rewards=[1.0, 4.0], prompts=["p", "p"])
    b = make_run(tmp_path / "b", rewards=[0.0, 0.0], prompts=["p", "p"])
    compare([a, b], tmp_path / "report")
    match = summary(tmp_path / "report")["pairwise"][0]
    assert (match["prompts"], match["reward_difference"]) == (2, 2.5)


def test_runs_under_different_judges_are_not_compared_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / name, rewards=[1.0], judge=name) for name in ("a", "b")]
    compare(runs, tmp_path / "report")
    assert "differ in reward_source (a: a, b: b)" in capsys.readouterr().out
    assert "differ in reward_source" in (tmp_path / "report" / "report.html").read_text()
    assert summary(tmp_path / "report")["pairwise"] == [
        {"row": "a", "column": "b", "note": "different judges (a, b)"},
        {"row": "b", "column": "a", "note": "different judges (b, a)"},
    ]


def test_the_report_needs_no_network_and_text_in_it_stays_text(tmp_path: Path) -> None:
    compare([make_run(tmp_path / "run", rewards=[1.0, -1.0])], tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert HOSTILE not in page
    assert "<img" not in page.replace("<img>", "")  # the charts' library writes the bare tag in an error message
    assert 'src="http' not in page
    assert "<link" not in page
    assert "50.0 % <small>[9.5, 90.5]</small>" in page


def test_an_interval_that_cannot_tell_is_told_beside_the_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare([make_run(tmp_path / "run", rewards=[1.0, 1.0, -1.0, math.nan])], tmp_path / "report")
    sentence = "run: 3 prompts cannot tell a win rate of 66.7 % from 50 %"
    assert sentence in capsys.readouterr().out
    assert sentence in (tmp_path / "report" / "report.html").read_text()


def test_what_has_no_value_is_a_dash_and_null(tmp_path: Path) -> None:
    nothing = make_run(tmp_path / "nothing", rewards=[math.nan] * 3, valid=False)
    some = make_run(tmp_path / "some", rewards=[1.0, 2.0, 3.0])
    compare([nothing, some], tmp_path / "report")
    content = summary(tmp_path / "report")
    assert content["runs"]["nothing"]["win_rate"] is None
    assert content["pairwise"][0]["note"] == "no prompt with a score from both"
    assert content["notes"][0] == "the evaluation of nothing is not valid: 3 of 3 pairs failed"


def test_the_calls_that_failed_and_why_are_in_the_report(tmp_path: Path) -> None:
    calls = {"asked": 8, "cached": 3, "requests": 7, "failed_requests": 2, "reasons": {"429": 1, HOSTILE: 1}}
    compare([make_run(tmp_path / "run", rewards=[1.0, -1.0], calls=calls)], tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "429: 1, &lt;/script&gt;" in page
    assert '<td data-label="failed requests">2</td>' in page


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere has no config.yaml"):
        compare([tmp_path / "nowhere"], tmp_path / "report")


def test_of_a_step_logged_twice_the_later_counts(tmp_path: Path) -> None:
    log = MetricsFile(tmp_path)
    log.log_metrics({"train/loss": 1.0}, step=1)
    log.log_metrics({"train/loss": 9.0, "val/loss": float("nan")}, step=2)
    log.log_metrics({"train/loss": 2.0}, step=2)
    assert read_curves(tmp_path / "metrics.jsonl") == {"train/loss": [(1, 1.0), (2, 2.0)]}


def test_a_long_curve_is_drawn_as_the_means_of_neighbours() -> None:
    points = thinned([(step, float(step % 2)) for step in range(1000)])
    assert points[:2] == [(0.5, 0.5), (2.5, 0.5)]
    assert len(points) == 500
    assert thinned([(3, 1.0)]) == [(3.0, 1.0)]


@pytest.mark.filterwarnings("ignore")
def test_the_same_tables_and_the_report_go_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_GROUP", "pipeline")
    runs = [make_run(tmp_path / name, rewards=[1.0, math.nan]) for name in ("a", "b")]
    compare(runs, tmp_path / "report", wandb_mode="offline")
    (media,) = (tmp_path / "report" / "wandb").glob("offline-run-*/files/media")
    tables = {
        file.name.partition("_")[0]: json.loads(file.read_text()) for file in (media / "table").glob("*.table.json")
    }
    headline = dict(zip(tables["headline"]["columns"], tables["headline"]["data"][0], strict=True))
    assert (headline["run"], headline["win_rate"], headline["failed"]) == ("a", 1.0, 1)
    assert headline["win_rate_low"] == pytest.approx(wilson_interval(1.0, 1).low)
    match = dict(zip(tables["pairwise"]["columns"], tables["pairwise"]["data"][0], strict=True))
    assert (match["row"], match["column"], match["ties"], match["note"]) == ("a", "b", 1, None)
    assert tables["completions"]["columns"][2:6] == ["reference", "reference score", "a", "a score"]
    assert tables["completions"]["data"][1][3:6] == [0.0, f"{HOSTILE}a 1", None]
    (page,) = (media / "html").glob("report_*.html")
    assert page.read_text() == (tmp_path / "report" / "report.html").read_text()


def test_a_failure_of_wandb_is_one_line_and_the_report_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no route [to] host\nand more")

    monkeypatch.setattr(command, "track", fail)
    compare([make_run(tmp_path / "run", rewards=[1.0])], tmp_path / "report", wandb_mode="online")
    assert (tmp_path / "report" / "report.html").is_file()
    assert "note: W&B has no comparison (ConnectionError: no route [to] host)\n" in capsys.readouterr().out
