"""``inspect``: rows in their pieces, what is learned of them, lengths, reasons; in the terminal and as a page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from commands.inspection.examine import histogram, round_width
from tests.command_line import Cli, assert_refused

PAIR = {"prompt": "Why?", "chosen": "As <b>it</b> is.", "rejected": "No \x1b[31midea."}
ROWS = [PAIR, {**PAIR, "chosen": "Thus.", "rejected": "Thus."}, {**PAIR, "chosen": ""}, {**PAIR, "rejected": " "}]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def options(rows: Path, model: Path, task: str = "preferences") -> list[str]:
    module = ["--data", "CustomDataModule", "--data.dataset_name", str(rows), "--data.task", task]
    return ["inspect", *module, "--model.model_name", str(model)]


def test_a_pair_is_shown_in_its_pieces_with_what_was_dropped_and_why(
    rows: Path, tiny_model_dir: Path, cli: Cli
) -> None:
    result = cli(*options(rows, tiny_model_dir), "--split", "train")
    assert result.returncode == 0, result.stderr
    shown = result.stdout
    assert "1 of 4 rows can be used" in shown
    assert (
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n{+As <b>it</b> is.<|im_end|>+}\n"
        "[-No \\x1b[31midea.<|im_end|>-]" in shown
    )
    assert "dropped: 2 empty completion\nrow 2: " in shown
    assert "dropped: 1 chosen equals rejected\nrow 1: " in shown
    assert '"chosen": "Thus."' in shown
    assert "\x1b" not in shown


def test_a_conversation_is_shown_with_what_is_learned(rows: Path, tiny_model_dir: Path, cli: Cli) -> None:
    result = cli(*options(rows, tiny_model_dir, "conversations"), "--rows", "1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("assistant\n{+As <b>it</b> is.<|im_end|>+}") == 2  # of each split one
    given = len("Why?") + len("user\n") + len("assistant\n") + 4
    learned = [len(text) + 1 for text in ("As <b>it</b> is.", "Thus.", "As <b>it</b> is.")]
    share = sum(learned) / (3 * given + sum(learned))
    assert f"{share:.0%} of them learned" in result.stdout


def test_token_ids_are_those_of_the_text(rows: Path, tiny_model_dir: Path, cli: Cli) -> None:
    result = cli(*options(rows, tiny_model_dir), "--split", "train", "--ids")
    listed = re.search(r"chosen: \[(.*)\]", result.stdout)
    assert listed is not None
    assert len(listed[1].split(", ")) == len("As <b>it</b> is.") + 1


class Page(HTMLParser):
    """Texts by the class of the element that they stand in."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        self.links += [given[name] for name in ("src", "href") if name in given]
        if tag not in ("meta", "br"):
            self.open.append(given.get("class") or tag)

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)


def test_the_page_stands_alone_and_shows_text_as_text(
    rows: Path, tiny_model_dir: Path, tmp_path: Path, cli: Cli
) -> None:
    output = tmp_path / "pages" / "rows.html"
    command = [*options(rows, tiny_model_dir), "--split", "train", "--output", str(output), "--ids"]
    assert cli(*command).returncode == 0
    page = Page()
    page.feed(output.read_text())
    assert page.links == []
    assert "As <b>it</b> is.<|im_end|>" in page.texts["chosen"]
    assert any(text.startswith("No ") for text in page.texts["rejected"])
    assert "b" not in page.open
    assert cli(*command).returncode == 0  # its own page is replaced
    output.write_text("a thesis")
    assert_refused(cli(*command), "is no page of inspect, so it is not replaced; change --output")
    assert output.read_text() == "a thesis"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--split", "third"], "--split must be train, validation or both, got third"),
        (["--rows", "0"], "--rows must be at least 1, got 0"),
        (["--data.dataset_name", "nowhere/at/all"], "nowhere/at/all does not exist; change data.dataset_name"),
        (["--data.max_length", "0"], "data.max_length must be at least 1"),
        (["--rwos", "1"], "rwos"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    arguments: list[str], told: str, rows: Path, tiny_model_dir: Path, cli: Cli
) -> None:
    assert_refused(cli(*options(rows, tiny_model_dir), *arguments), told)


def test_without_data_the_config_is_asked_for(cli: Cli) -> None:
    assert_refused(cli("inspect"), "no data is named: name a config (--config configs/sft.yaml)")


def test_a_histogram_counts_every_row_once_in_round_steps() -> None:
    bars = histogram([1, 10, 11, 115, 120])
    assert [(bar.low, bar.high, bar.rows) for bar in bars][:2] == [(1, 10, 2), (11, 20, 1)]
    assert bars[-1] == (111, 120, 2)
    assert sum(bar.rows for bar in bars) == 5
    assert [round_width(least) for least in (0.3, 1.5, 2, 3, 7, 11)] == [1, 2, 2, 5, 10, 20]
    assert histogram([]) == []
