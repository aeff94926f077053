"""``compare`` of folders as a kill, a full disk or a stranger leaves them: what is broken is noted, the rest told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commands.compare import compare
from commands.comparison.run_files import loaded
from core.errors import ConfigurationError
from tests.compared_runs import make_run

pytestmark = pytest.mark.filterwarnings("ignore")

FINAL = Path("eval") / "final"
HUGE = "1" + "0" * 400


def write(name: str | Path, text: str | bytes) -> Callable[[Path], None]:
    return lambda run: (run / name).write_bytes(text if isinstance(text, bytes) else text.encode())  # type: ignore[return-value]


def cut(name: str | Path) -> Callable[[Path], None]:
    """As a kill within the last line leaves a file."""
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[:-7])  # type: ignore[return-value]


def append(name: str | Path, line: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text((run / name).read_text() + line + "\n")  # type: ignore[return-value]


def folder(name: str | Path) -> Callable[[Path], None]:
    def make(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()

    return make


def remove(name: str | Path) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def change(**values: Any) -> Callable[[Path], None]:
    """Other values in ``metrics.json``; no value where it is None."""

    def make(run: Path) -> None:
        path = run / FINAL / "metrics.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return make


def digest_of_no_weights(run: Path) -> None:
    change(model_digest="x")(run)
    (run / "final").mkdir()
    (run / "final" / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      cut")


def pair(**values: Any) -> str:
    row = {"prompt": [{"role": "user", "content": "q"}], "completion": "a", "reference_completion": "b"}
    return json.dumps({**row, "reward": 1.0, "reference_reward": 0.0, **values})


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "config empty": (write("config.yaml", ""), "holds no options"),
    "config a list": (write("config.yaml", "[1]"), "holds no options"),
    "config no YAML": (write("config.yaml", "a: [1"), "is no YAML"),
    "config without a model": (write("config.yaml", "seed_everything: 1"), ""),
    "config with a model of another kind": (write("config.yaml", "model: {class_path: 3}"), ""),
    "config with an alias of itself": (write("config.yaml", "a: &a [*a]"), "or itself"),
    "config no text": (write("config.yaml", b"\xff\xfe\x00"), "cannot be"),
    "config with another export": (write("config.yaml", "export: {directory: 7}\nmodel: 1"), ""),
    "pairs cut": (cut(FINAL / "pairs.jsonl"), "has 1 broken lines of 5"),
    "pairs empty": (write(FINAL / "pairs.jsonl", ""), "on different prompts"),
    "pairs missing": (remove(FINAL / "pairs.jsonl"), "on different prompts"),
    "pairs a folder": (folder(FINAL / "pairs.jsonl"), "on different prompts"),
    "pairs not UTF-8": (write(FINAL / "pairs.jsonl", b"\xff\xff\n"), "has 1 broken lines of 1"),
    "a prompt without turns": (append(FINAL / "pairs.jsonl", pair(prompt=[])), "has 1 broken lines of 6"),
    "a prompt of text": (append(FINAL / "pairs.jsonl", pair(prompt="q")), "has 1 broken lines of 6"),
    "a turn of text": (append(FINAL / "pairs.jsonl", pair(prompt=["q"])), "has 1 broken lines of 6"),
    "a turn without content": (append(FINAL / "pairs.jsonl", pair(prompt=[{"role": "user"}])), "1 broken lines of 6"),
    "no completion": (append(FINAL / "pairs.jsonl", pair(completion=None)), "has 1 broken lines of 6"),
    "a reward of text": (append(FINAL / "pairs.jsonl", pair(reward="1")), "has 1 broken lines of 6"),
    "a huge reward": (append(FINAL / "pairs.jsonl", pair(reward=1).replace(": 1,", f": {HUGE},")), "on different"),
    "a length of text": (append(FINAL / "pairs.jsonl", pair(completion_tokens="3")), "has 1 broken lines of 6"),
    "half a surrogate": (append(FINAL / "pairs.jsonl", pair(completion="\ud800")), "on different"),
    "pairs a number": (append(FINAL / "pairs.jsonl", "7"), "has 1 broken lines of 6"),
    "a line of 100,000 levels": (append(FINAL / "pairs.jsonl", "[" * 100_000), "has 1 broken lines of 6"),
    "metrics cut": (cut(FINAL / "metrics.json"), "metrics.json of final is no JSON object"),
    "metrics empty": (write(FINAL / "metrics.json", ""), "has no evaluation"),
    "metrics a list": (write(FINAL / "metrics.json", "[]"), "metrics.json of final is no JSON object"),
    "metrics of another program": (write(FINAL / "metrics.json", '{"accuracy": 1}'), "win_rate is not there"),
    "metrics a folder": (folder(FINAL / "metrics.json"), "has no evaluation"),
    "a win rate of text": (change(win_rate="much"), "win_rate is something else"),
    "an interval of one bound": (change(win_rate_ci=[0.5]), "win_rate_ci is something else"),
    "a negative count": (change(wins=-1), "wins is something else"),
    "no judge": (change(reward_source=None), "reward_source is something else"),
    "a breakdown of numbers": (change(win_rate_by_source=[1, 2]), ""),
    "calls of text": (change(calls="none", valid="yes"), ""),
    "a huge number": (
        lambda run: (run / FINAL / "metrics.json").write_text(  # type: ignore[return-value]
            (run / FINAL / "metrics.json").read_text().replace('"length_ratio": ', f'"length_ratio": {HUGE}, "x": ')
        ),
        "",
    ),
    "infinities": (change(average_reward=float("inf"), win_rate=float("nan")), ""),
    "markup in the judge's name": (change(reward_source="[/red]\x1b[31mjudge"), "differ in reward_source"),
    "an evaluation that was set aside": (lambda run: (run / "eval" / "epoch=0.old").mkdir(), ""),
    "an epoch that is no number": (lambda run: (run / "eval" / "epoch=x").mkdir(), ""),
    "an epoch without files": (lambda run: (run / "eval" / "epoch=3").mkdir(), ""),
    "curves cut": (cut("metrics.jsonl"), "metrics.jsonl of run has 1 broken lines of 2"),
    "curves a list": (write("metrics.jsonl", "[]\n"), "has 1 broken lines of 1"),
    "curves with a huge number": (append("metrics.jsonl", f'{{"step": 3, "train/loss": {HUGE}}}'), ""),
    "curves with a step of text": (append("metrics.jsonl", '{"step": "x", "train/loss": 1}'), "1 broken lines of 3"),
    "curves with odd values": (append("metrics.jsonl", '{"step": 3, "train/a": [], "train/b": true}'), ""),
    "environment empty": (write("environment.json", ""), ""),
    "environment a list": (write("environment.json", "[]"), "is no JSON object"),
    "environment without packages": (write("environment.json", '{"packages": 3}'), ""),
    "final weights cut": (digest_of_no_weights, "weights of final cannot be read"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("good") / "other", rewards=[1.0, -1.0, 2.0, 0.0, 1.0])


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_folder_is_noted_and_the_rest_told(
    broken: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, note = BROKEN[broken]
    run = make_run(tmp_path / "run", rewards=[1.0, 1.0, -2.0, 0.0, 3.0])
    spoil(run)
    compare([run, good], tmp_path / "report", wandb_mode="disabled")
    content = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert content["runs"]["other"]["wins"] == 3
    assert note in " ".join(content["notes"])
    if not note:
        assert content["notes"] == []
    assert "other" in (tmp_path / "report" / "report.html").read_text()
    assert "\x1b" not in capsys.readouterr().out


def test_an_evaluation_that_cannot_be_used_gives_way_to_the_last_epoch_s(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rewards=[1.0, 1.0], folder="epoch=0")
    make_run(tmp_path / "run", rewards=[1.0, -1.0], folder="epoch=1")
    (run / "eval" / "final").mkdir()
    (run / "eval" / "final" / "metrics.json").write_text("{")
    compare([run], tmp_path / "report", wandb_mode="disabled")
    content = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert content["runs"]["run"]["from"] == "epoch=1"


def test_markup_and_escapes_in_names_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "[bold]a[red]\x1b]0;title\x07", rewards=[1.0, 1.0])
    compare([run], tmp_path / "[red]report", wandb_mode="disabled")
    out = capsys.readouterr().out
    assert "[bold]a[red]\\x1b]0;title\\x07" in out
    assert "[red]report" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("name", ["summary.json", "report.html"])
def test_a_comparison_replaces_nothing_but_a_comparison(name: str, good: Path, tmp_path: Path) -> None:
    compare([good], tmp_path / "report", wandb_mode="disabled")
    compare([good], tmp_path / "report", wandb_mode="disabled")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / name).write_text('{"mine": 1}')
    with pytest.raises(ConfigurationError, match=rf"{name} is of no comparison, so it is not replaced"):
        compare([good], mine, wandb_mode="disabled")
    assert [file.name for file in mine.iterdir()] == [name]
    (mine / name).unlink()
    (mine / name).symlink_to(tmp_path / "report" / name)
    with pytest.raises(ConfigurationError, match="is of no comparison"):
        compare([good], mine, wandb_mode="disabled")


def test_numbers_beyond_all_bounds_are_none() -> None:
    assert loaded(f"[{HUGE}, -{HUGE}, 1e999, NaN, -Infinity, 3, 0.5]") == [None, None, None, None, None, 3, 0.5]
    assert loaded("[" * 100_000) is None
    assert loaded("1" * 10_000) is None
