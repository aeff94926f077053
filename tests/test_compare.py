"""``compare``: what it reads, what it warns of, and a report in which text stays text."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from callbacks.evaluation_files import write
from callbacks.evaluation_metrics import Pair, Side, evaluation_metrics
from callbacks.metrics_file import MetricsFile
from commands.compare import compare
from commands.runs import read_curves
from datamodules.errors import ConfigurationError


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


HOSTILE = "</script><img src=x onerror=alert(1)>"


def make_run(
    directory: Path, *, rewards: list[float], method: str = "DPOModule", judge: str = "judge", folder: str = "final"
) -> Path:
    """A run's folder with an evaluation against a reference that scores 0 everywhere."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(yaml.safe_dump({"model": {"class_path": f"lightning_modules.{method}"}}))
    pairs = [
        Pair.of([{"role": "user", "content": f"q{i}"}], Side(f"{HOSTILE}{i}", 3), Side("ref", 3), reward, 0.0)
        for i, reward in enumerate(rewards)
    ]
    metrics: dict[str, Any] = {**evaluation_metrics(pairs), "reward_source": judge, "reference": "base", "valid": True}
    write(directory / "eval" / folder, metrics, pairs)
    MetricsFile(directory).log_metrics({"train/loss": 0.5}, step=1)
    return directory


def test_the_headline_is_that_of_the_final_evaluation_else_of_the_last_epoch(tmp_path: Path) -> None:
    final = make_run(tmp_path / "final", rewards=[1.0, 1.0, -1.0, 0.0])
    make_run(final, rewards=[-1.0] * 4, folder="epoch=0")
    epochs = make_run(tmp_path / "epochs", rewards=[-1.0] * 4, folder="epoch=2")
    make_run(epochs, rewards=[1.0] * 4, folder="epoch=10")
    compare([final, epochs], tmp_path / "report")
    runs = json.loads((tmp_path / "report" / "summary.json").read_text())["runs"]
    assert (runs["final"]["win_rate"], runs["final"]["from"]) == (2.5 / 4, "final")
    assert (runs["epochs"]["win_rate"], runs["epochs"]["from"]) == (1.0, "epoch=10")


def test_runs_under_different_judges_are_not_compared_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / name, rewards=[1.0], judge=name) for name in ("a", "b")]
    compare(runs, tmp_path / "report")
    assert "differ in reward_source (a: a, b: b)" in capsys.readouterr().out
    assert "differ in reward_source" in (tmp_path / "report" / "report.html").read_text()


def test_the_report_needs_no_network_and_text_in_it_stays_text(tmp_path: Path) -> None:
    compare([make_run(tmp_path / "run", rewards=[1.0, -1.0])], tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert HOSTILE not in page
    assert 'src="http' not in page
    assert "<link" not in page
    assert "50.0 % <small>[9.5, 90.5]</small>" in page


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere has no config.yaml"):
        compare([tmp_path / "nowhere"], tmp_path / "report")


def test_of_a_step_logged_twice_the_later_counts(tmp_path: Path) -> None:
    log = MetricsFile(tmp_path)
    log.log_metrics({"train/loss": 1.0}, step=1)
    log.log_metrics({"train/loss": 9.0, "val/loss": float("nan")}, step=2)
    log.log_metrics({"train/loss": 2.0}, step=2)
    assert read_curves(tmp_path / "metrics.jsonl") == {"train/loss": [(1, 1.0), (2, 2.0)]}
