"""``chat``: history, streaming, two models, scores, commands, and what a terminal must not act on."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from commands.chat import Screen, Settings, Speaker, Talk, found_model, labels, talk_until_the_end
from datamodules.chat import encode_conversation, stop_token_ids
from lightning_modules.generation import sampler
from lightning_modules.generation.sampler import sample_completions
from lightning_modules.rewards.rules import brevity
from tests.command_line import Cli, assert_refused


def greedy(speaker: Speaker, messages: list[dict[str, str]], length: int) -> str:
    """What the model says to a conversation, by the sampler alone."""
    samples = sample_completions(
        speaker.model,
        [torch.tensor(encode_conversation(speaker.tokenizer, messages, add_generation_prompt=True).input_ids)],
        max_completion_length=length,
        stop_token_ids=stop_token_ids(speaker.tokenizer),
        seeds=[0],
        temperature=0.0,
    )
    return str(samples.texts(speaker.tokenizer)[0])


@pytest.fixture
def speaker(tiny_model_dir: Path) -> Speaker:
    return Speaker("tiny", str(tiny_model_dir), Settings(0.0, 6, 42))


@pytest.mark.parametrize("stay", [False, True], ids=["rows leave at once", "rows leave late, as on a GPU"])
def test_every_step_tells_which_samples_have_a_further_token(
    speaker: Speaker, stay: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stay:
        monkeypatch.setattr(sampler, "_leaves", lambda ended, step: 0)
    told: dict[int, list[int]] = {0: [], 1: [], 2: []}

    def add(rows: Tensor, tokens: Tensor, further: Tensor) -> None:
        for row, token in zip(rows[further].tolist(), tokens[further].tolist(), strict=True):
            told[row].append(token)

    samples = sample_completions(
        speaker.model,
        [torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([4, 5, 6])],
        max_completion_length=40,
        stop_token_ids=list(range(60)),
        seeds=[1, 2, 3],
        on_tokens=add,
    )
    for row in range(3):
        assert told[row] == samples.tokens.input_ids[row][samples.tokens.completion_mask[row]].tolist()
    assert len({len(tokens) for tokens in told.values()}) > 1


def test_what_is_drawn_behind_the_stop_is_no_part_of_an_answer(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("commands.chat.stop_token_ids", lambda tokenizer: list(range(100)))
    speaker = Speaker("tiny", str(tiny_model_dir), Settings(1.0, 40, 42))
    expected = [speaker.answer("Hi", lambda text: None)]
    assert len(expected[0]) < 40
    monkeypatch.setattr(sampler, "_leaves", lambda ended, step: 0)
    again = Speaker("tiny", str(tiny_model_dir), Settings(1.0, 40, 42))
    assert [again.answer("Hi", lambda text: None)] == expected
    assert again.messages[-1]["content"] == expected[0]


def test_an_answer_grows_and_the_next_one_knows_what_was_said(speaker: Speaker) -> None:
    grown: list[str] = []
    first = speaker.answer("Hi", grown.append)
    assert first == greedy(speaker, [{"role": "user", "content": "Hi"}], 6)
    assert grown[-1] == first
    assert len(grown) == 6
    second = speaker.answer("Why?", grown.append)
    history = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Why?"},
    ]
    assert speaker.messages[:3] == history
    assert second == greedy(speaker, history, 6)


def test_a_conversation_that_grows_too_long_loses_its_beginning(speaker: Speaker) -> None:
    for _ in range(6):
        speaker.answer("x" * 40, lambda _: None)
    assert len(speaker._prompt()) <= speaker.longest - 6
    whole = encode_conversation(speaker.tokenizer, speaker.messages, add_generation_prompt=True).input_ids
    assert len(whole) > speaker.longest


def test_what_is_cut_off_is_kept_as_far_as_it_is(speaker: Speaker) -> None:
    def interrupt(text: str) -> None:
        if len(text) >= 3 and not text.endswith("..."):
            raise KeyboardInterrupt

    said = speaker.answer("Hi", interrupt)
    whole = greedy(speaker, [{"role": "user", "content": "Hi"}], 6)
    assert whole.startswith(said)
    assert len(said) < len(whole)
    assert speaker.messages[-1] == {"role": "assistant", "content": said}


def screen_of(*, terminal: bool, piped: bool, side_by_side: bool) -> tuple[Screen, io.StringIO]:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=60, color_system=None)
    return Screen(console, side_by_side=side_by_side, piped=piped), output


def test_two_models_answer_side_by_side_with_scores(tiny_model_dir: Path) -> None:
    settings = Settings(0.0, 6, 42)
    speakers = [Speaker(name, str(tiny_model_dir), settings) for name in ("left", "right")]
    talk = Talk(speakers, settings, reward=brevity)
    screen, output = screen_of(terminal=True, piped=False, side_by_side=True)
    screen.answers(talk, "Hi")
    drawn = output.getvalue()
    assert "left" in drawn
    assert "right" in drawn
    score = brevity([speakers[0].messages[:1]], [speakers[0].messages[1]["content"]])[0]
    assert f"score {score:.3f}" in drawn


def test_commands_change_the_talk(speaker: Speaker) -> None:
    talk = Talk([speaker], speaker.settings, system="Be brief.")
    speaker.answer("Hi", lambda _: None)
    talk.command("/reset")
    assert speaker.messages == [{"role": "system", "content": "Be brief."}]
    talk.command("/system Be long.")
    assert speaker.messages == [{"role": "system", "content": "Be long."}]
    talk.command("/system")
    assert speaker.messages == []
    assert talk.command("/temperature 0.5") == "temperature 0.5"
    assert speaker.settings.temperature == 0.5
    for wrong in ("-1", "x", "", "nan"):
        assert "takes a number from 0" in str(talk.command(f"/temperature {wrong}"))
    assert speaker.settings.temperature == 0.5
    assert "no command /rest" in str(talk.command("/rest"))
    assert talk.command("/exit") is None


def test_piped_lines_are_answered_one_by_one_and_shown_harmless(speaker: Speaker, monkeypatch: Any) -> None:
    screen, output = screen_of(terminal=False, piped=True, side_by_side=False)
    talk = Talk([speaker], speaker.settings)
    monkeypatch.setattr(speaker, "answer", lambda question, _: f"\x1b[31m{question}!")
    talk_until_the_end(talk, screen, io.StringIO("one\n\n/temperature 1\n two \n/exit\nthree\n"))
    assert output.getvalue() == "\\x1b[31mone!\ntemperature 1\n\\x1b[31mtwo!\n"


def test_the_command_answers_what_is_piped_in(tiny_model_dir: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    result = cli("chat", str(tiny_model_dir), "--temperature", "0", "--max_completion_length", "6")
    assert result.returncode == 0, result.stderr
    speaker = Speaker("tiny", str(tiny_model_dir), Settings(0.0, 6, 42))
    said = greedy(speaker, [{"role": "user", "content": "Hi"}], 6)
    assert result.stdout.splitlines()[0].startswith(said.splitlines()[0][:2].rstrip())


def test_a_runs_folder_stands_for_its_model(tmp_path: Path) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    assert found_model(str(tmp_path / "run")) == str(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "final").mkdir()
    assert found_model(str(tmp_path / "run")) == str(tmp_path / "run" / "final")
    assert found_model("org/name") == "org/name"
    assert labels(["outputs/sft/final", "outputs/dpo/final"]) == ["sft", "dpo"]
    assert labels(["a/x", "b/x"]) == ["1 a/x", "2 b/x"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere/at/all"], "nowhere/at/all does not exist"),
        (["{model}", "--temperature", "-1"], "--temperature must be 0 or more, got -1"),
        (["{model}", "--max_completion_length", "0"], "--max_completion_length must be at least 1, got 0"),
        (["{model}", "--max_completion_length", "999"], "reads at most 256 tokens; lower --max_completion_length"),
        (["{model}", "{model}", "{model}"], "chat takes one model or two, got 3"),
        (["{model}", "--reward", "no.such.reward"], "--reward"),
        ([], "required: DIR"),
    ],
)
def test_what_cannot_be_talked_with_is_refused(arguments: list[str], told: str, tiny_model_dir: Path, cli: Cli) -> None:
    assert_refused(cli("chat", *(part.format(model=tiny_model_dir) for part in arguments)), told)
