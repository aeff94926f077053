"""``compare``: what it reads, what it computes, what it warns of, and what it hands to W&B."""

import html
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from callbacks.evaluation.result import Calls
from callbacks.evaluation.result_record import is_number
from callbacks.logging.metrics_file import MetricsFile
from commands import compare as command
from commands.compare import compare
from commands.comparison.charts import thinned
from commands.comparison.pairwise import pairwise
from commands.comparison.run_files import Reader
from commands.comparison.runs import read_curves, read_runs
from commands.comparison.tables import headline_tables, interval, pairwise_table, percent
from core.errors import ConfigurationError
from datamodules.chat import load_tokenizer
from lightning_modules.functional.statistics import win_rate_interval
from lightning_modules.models.identity import tensors_digest
from lightning_modules.models.loading import load_causal_lm
from tests.command_line import Cli, assert_refused
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
    assert there["win_rate_ci"] == pytest.approx(list(win_rate_interval(1, 1, 1)))
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
    assert "50.0 % <small>[5.5, 94.5]</small>" in page


def test_an_interval_that_cannot_tell_is_told_beside_the_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare([make_run(tmp_path / "run", rewards=[1.0, 1.0, -1.0, math.nan])], tmp_path / "report")
    sentence = "run: not to be told from the reference; 3 prompts cannot tell a win rate of 66.7 % from 50 %"
    assert sentence in capsys.readouterr().out
    assert sentence in (tmp_path / "report" / "report.html").read_text()


def told(tmp_path: Path, **runs: dict[str, Any]) -> list[str]:
    compare([make_run(tmp_path / name, **options) for name, options in runs.items()], tmp_path / "report")
    content = summary(tmp_path / "report")
    page = html.unescape((tmp_path / "report" / "report.html").read_text())
    assert all(f"<li>{sentence}</li>" in page for sentence in content["verdicts"])
    answers: list[str] = content["verdicts"]
    return answers


def test_whether_they_got_better_is_answered_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where length varies both ways and means nothing, equal length changes nothing."""
    tokens = [2, 4] * 20
    answers = told(
        tmp_path,
        good={"rewards": [2.0] * 30 + [-1.0] * 10, "tokens": tokens},
        bad={"rewards": [-1.0] * 32 + [1.0] * 8, "tokens": tokens},
        unsure={"rewards": [1.0, -1.0, 1.0, -1.0] * 9 + [1.0] * 4, "tokens": tokens},
    )
    assert answers[0].startswith("good: yes, better than the reference; it wins 75.0 % [")
    assert "] of 40 prompts. At equal length too: 75.0 % [" in answers[0]
    assert answers[1].startswith("bad: no, worse than the reference; it wins 20.0 % [")
    assert answers[2].startswith(
        "unsure: not to be told from the reference; 40 prompts cannot tell a win rate of 55.0 %"
    )
    assert answers[3].startswith("good is better than bad: it wins 77.5 % [")
    assert answers[5].startswith("unsure is better than bad: it wins 67.5 % [")
    assert len(answers) == 6
    assert f"Did they get better?\n  {answers[0]}\n" in capsys.readouterr().out


def test_an_answer_says_where_length_may_be_all_there_is_to_it(tmp_path: Path) -> None:
    """The longer ones win and the shorter ones lose, but for a few; or all are longer."""
    rewards = [1.0] * 35 + [-1.0] * 15
    by_length = [9] * 33 + [1] * 2 + [1] * 13 + [9] * 2
    answers = told(
        tmp_path,
        long={"rewards": rewards, "tokens": by_length},
        longer={"rewards": rewards, "tokens": [30] * 50},
    )
    assert "long: yes" in answers[0]
    assert "But at equal length that is not to be told: " in answers[0]
    assert answers[0].endswith("; its answers are 2.20 times as long.")
    assert answers[1].endswith(
        "At equal length: not known (only 0 of 50 answers are as short as the reference's, or shorter)."
    )


def test_a_win_rate_and_a_mean_reward_that_part_ways_are_both_told(tmp_path: Path) -> None:
    rewards = [1.0] * 40 + [-50.0 - place for place in range(10)]
    assert (
        "But its mean reward differs by -10.10 [" in told(tmp_path, run={"rewards": rewards, "tokens": [2, 4] * 25})[0]
    )


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160, 200])
def test_in_a_narrow_terminal_every_run_has_its_figures_whole(width: int, tmp_path: Path) -> None:
    names = ["sft", "dpo-from-the-sft-model", "rloo", "dpo-2"]
    runs = read_runs([make_run(tmp_path / name, rewards=[1.0, -1.0, 1.0]) for name in names])
    console = Console(width=width, record=True, file=io.StringIO())
    tables = headline_tables(runs, width=width)
    for table in tables:
        console.print(table)
    console.print(pairwise_table(pairwise(runs), width=width))
    text = console.export_text()
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    headers = [str(column.header) for table in tables for column in table.columns]
    if width >= 200:
        assert headers[:2] == ["run", "win rate"]
        assert len(tables) == 1
    else:
        assert [header for header in headers if header != "run"] == names
    assert text.count("66.7 %") == len(names), "each run's win rate"
    assert runs[0].headline is not None
    assert text.count(interval(runs[0].headline.win_rate_ci, percent)) == len(names), "and its interval"
    assert sum(text.count(f"{name}") for name in names) >= 2 * len(names)


def test_without_a_valid_evaluation_there_is_no_answer(tmp_path: Path) -> None:
    answers = told(tmp_path, run={"rewards": [1.0, 1.0, math.nan], "valid": False})
    assert answers == ["run: not known; 1 of 3 pairs have no score."]


def test_close_scores_are_told_apart_in_a_match_as_in_an_evaluation(tmp_path: Path) -> None:
    """In single precision -20.0000001 and -20.0000002 are equal."""
    a = make_run(tmp_path / "a", rewards=[-20.0000001])
    b = make_run(tmp_path / "b", rewards=[-20.0000002])
    compare([a, b], tmp_path / "report")
    match = summary(tmp_path / "report")["pairwise"][0]
    assert (match["wins"], match["ties"], match["losses"]) == (1, 0, 0)


def test_a_digest_is_of_every_tensor_once_in_whatever_order_and_precision() -> None:
    a, b, c = torch.arange(3.0), torch.arange(3.0, 6.0), torch.tensor([3.0, 4.0, 5.5])
    assert tensors_digest([a, b, a]) == tensors_digest([b, a]) == tensors_digest([a.bfloat16(), b])
    assert len({tensors_digest(part) for part in ([a, b], [a, c], [a], [b], [a, b.view(1, 3)])}) == 5


def test_an_evaluation_of_other_weights_than_the_final_ones_is_noted(tmp_path: Path, tiny_model_dir: Path) -> None:
    """The digest is that of the loaded model's tensors, the tied ones once, and of the file's."""
    model = load_causal_lm(str(tiny_model_dir), load_tokenizer(str(tiny_model_dir)))
    digest = tensors_digest(model.state_dict().values())
    assert tensors_digest(model.bfloat16().float().state_dict().values()) != digest
    for name, judged in (("same", digest), ("other", "0" * 64)):
        run = make_run(tmp_path / name, rewards=[1.0], model="a model", model_digest=judged)
        shutil.copytree(tiny_model_dir, run / "final")
    compare([tmp_path / "same", tmp_path / "other"], tmp_path / "report")
    assert summary(tmp_path / "report")["notes"] == [
        "the evaluation of other (eval/final) is of other weights than its final model: it judged a model; validate "
        "with the run's config judges the final one"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "run"], "run is named 2 times; name each run once"),
        (["run", "--output", "run/config.yaml"], "run/config.yaml' (File exists); change --output"),
        (["run", "--output", "/proc/none"], "cannot write into '/proc/none'"),
        (["run", "--outptu", "x"], "there is no option '--outptu'; did you mean output?"),
        ([], "runs"),
    ],
)
def test_a_wrong_option_of_compare_is_told_in_a_line(
    arguments: list[str], message: str, tmp_path: Path, cli: Cli
) -> None:
    make_run(tmp_path / "run", rewards=[1.0])
    placed = [str(tmp_path / part) if part.startswith("run") else part for part in arguments]
    assert_refused(cli("compare", *placed), message)


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
    compare([make_run(tmp_path / "run", rewards=[1.0, -1.0], calls=Calls(**calls))], tmp_path / "report")
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
    assert read_curves(tmp_path / "metrics.jsonl", Reader("run")) == {"train/loss": [(1, 1.0), (2, 2.0)]}


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
    assert headline["win_rate_low"] == pytest.approx(win_rate_interval(1, 0, 0).low)
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


def test_only_a_finite_value_is_a_number() -> None:
    assert [is_number(value) for value in (1, 0.5, math.nan, math.inf, None, "1", True)] == [True, True, *[False] * 5]
