"""``chat``: talk with a model in the terminal, or with two side by side, and have a reward score what they say."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from commands import options
from commands.parsing import restrict
from commands.quiet import quieten
from core.errors import ConfigurationError
from core.text import shown
from datamodules.chat import encode_conversation, load_tokenizer, stop_token_ids
from datamodules.messages import Message, shortened
from lightning_modules.generation.sampler import sample_completions
from lightning_modules.models.loading import load_causal_lm, load_config, most_tokens
from lightning_modules.rewards import Reward, resolve_reward
from lightning_modules.rewards.base import checked_scores

UNFINISHED = "�"
"""What a decoder writes for the first bytes of a letter."""


def run() -> None:
    """Parse the command line and talk."""
    own = options.chat().parse_args(sys.argv[1:])
    if len(own.models) > 2:
        raise ConfigurationError(f"chat takes one model or two, got {len(own.models)}")
    if own.max_completion_length < 1:
        raise ConfigurationError(f"--max_completion_length must be at least 1, got {own.max_completion_length}")
    quieten()
    restrict()
    disable_progress_bar()
    reward = None if own.reward is None else resolve_reward(own.reward, option="--reward")
    settings = Settings(checked_temperature(own.temperature), own.max_completion_length, own.seed)
    names = labels(own.models)
    speakers = [Speaker(name, found_model(model), settings) for name, model in zip(names, own.models, strict=True)]
    talk = Talk(speakers, settings, reward=reward, system=own.system)
    screen = Screen(Console(), side_by_side=len(speakers) > 1, piped=not sys.stdin.isatty())
    talk_until_the_end(talk, screen, sys.stdin)


class Settings:
    """How answers are sampled."""

    def __init__(self, temperature: float, max_completion_length: int, seed: int) -> None:
        self.temperature = temperature
        self.max_completion_length = max_completion_length
        self.seed = seed


class Speaker:
    """A model with what it and the user have said.

    Args:
        name: How it is called on the screen.
        model_name: Hub id or directory.
        settings: Of the sampling.
    """

    def __init__(self, name: str, model_name: str, settings: Settings) -> None:
        self.name = name
        self.settings = settings
        self.tokenizer = load_tokenizer(model_name, option="DIR")
        self.longest = most_tokens(load_config(model_name, option="DIR")) or sys.maxsize
        if settings.max_completion_length >= self.longest:
            raise ConfigurationError(
                f"{model_name} reads at most {self.longest} tokens; lower --max_completion_length "
                f"({settings.max_completion_length})"
            )
        on_gpu = torch.cuda.is_available()
        model = load_causal_lm(model_name, self.tokenizer, option="DIR").eval()
        self.model = model.to("cuda", torch.bfloat16) if on_gpu else model  # type: ignore[arg-type]
        self.messages: list[Message] = []

    def answer(self, question: str, on_text: Callable[[str], None]) -> str:
        """Answer, keep both turns, and tell the text as it grows; what Ctrl-C cuts off is kept as far as it is."""
        self.messages.append({"role": "user", "content": question})
        ids: list[int] = []

        def add(_rows: Tensor, drawn: Tensor, further: Tensor) -> None:
            ids.extend(drawn[further].tolist())
            on_text(self._text(ids))

        try:
            sample_completions(
                self.model,
                [torch.tensor(self._prompt())],
                max_completion_length=self.settings.max_completion_length,
                stop_token_ids=stop_token_ids(self.tokenizer),
                seeds=[self.settings.seed + len(self.messages)],
                temperature=self.settings.temperature,
                on_tokens=add,
            )
        except KeyboardInterrupt:
            on_text(self._text(ids) + " ...")
        said = self._text(ids)
        self.messages.append({"role": "assistant", "content": said})
        return said

    def _prompt(self) -> list[int]:
        """The conversation's tokens, without its earliest exchanges where the model could not read all."""
        room = self.longest - self.settings.max_completion_length
        for shorter in shortened(self.messages):
            ids = encode_conversation(self.tokenizer, shorter, add_generation_prompt=True).input_ids
            if len(ids) <= room:
                break
        return ids[-room:]

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


class Talk:
    """A conversation with each speaker, from the same words of the user."""

    def __init__(
        self, speakers: list[Speaker], settings: Settings, *, reward: Reward | None = None, system: str | None = None
    ) -> None:
        self.speakers = speakers
        self.settings = settings
        self.reward = reward
        self.system = system
        self.reset()

    def reset(self) -> None:
        """Begin anew, with the system's turn where there is one."""
        for speaker in self.speakers:
            speaker.messages = [{"role": "system", "content": self.system}] if self.system else []

    def command(self, line: str) -> str | None:
        """Obey a line that begins with a slash; what to say of it, None to leave."""
        name, _, rest = line.partition(" ")
        if name in ("/exit", "/quit"):
            return None
        if name == "/reset":
            self.reset()
            return "begun anew"
        if name == "/system":
            self.system = rest.strip() or None
            self.reset()
            return (
                f"begun anew, with the system's turn: {self.system}" if self.system else "begun anew, without a system"
            )
        if name == "/temperature":
            try:
                self.settings.temperature = checked_temperature(float(rest))
            except (ValueError, ConfigurationError):
                return f"/temperature takes a number from 0, got {rest.strip()!r}"
            return f"temperature {self.settings.temperature:g}"
        return options.IN_A_TALK if name == "/help" else f"no command {name}\n{options.IN_A_TALK}"

    def score(self, speaker: Speaker) -> float | None:
        """What the reward gives to the last answer; None without one."""
        if self.reward is None:
            return None
        *prompt, answer = speaker.messages
        return checked_scores(self.reward, [prompt], [answer["content"]])[0]


class Screen:
    """Where answers appear: as they grow, in columns where there are two, as plain lines where it is no terminal."""

    def __init__(self, console: Console, *, side_by_side: bool, piped: bool) -> None:
        self.console = console
        self.side_by_side = side_by_side
        self.piped = piped
        if not piped:
            self.say("/help for what else there is; Ctrl-D to leave", style="dim")

    def say(self, line: str, style: str = "") -> None:
        """A line about the talk."""
        self.console.print(Text(shown(line)), style=style, soft_wrap=True)

    def lines(self, source: TextIO) -> Iterator[str]:
        """What the user says, until the end; an empty line is passed over."""
        while True:
            try:
                line = source.readline() if self.piped else f"{self.console.input('[bold]> [/]')}\n"
            except (EOFError, KeyboardInterrupt):
                return
            if not line:
                return
            if line.strip():
                yield line.strip()

    def answers(self, talk: Talk, question: str) -> None:
        """Have each speaker answer, and show it."""
        texts = {speaker.name: "" for speaker in talk.speakers}
        scores: dict[str, float | None] = {}
        if not self.console.is_terminal or self.piped:
            for speaker in talk.speakers:
                texts[speaker.name] = speaker.answer(question, lambda _: None)
                name = f"{speaker.name}: " if self.side_by_side else ""
                self.say(f"{name}{texts[speaker.name]}")
                if (score := talk.score(speaker)) is not None:
                    self.say(f"{name}score {score:.3f}")
            return
        with Live(console=self.console, refresh_per_second=12, vertical_overflow="visible") as live:
            for speaker in talk.speakers:

                def grow(text: str, name: str = speaker.name) -> None:
                    texts[name] = text.removesuffix(UNFINISHED)
                    live.update(self._drawn(texts, scores))

                speaker.answer(question, grow)
                scores[speaker.name] = talk.score(speaker)
                live.update(self._drawn(texts, scores))

    def _drawn(self, texts: dict[str, str], scores: dict[str, float | None]) -> RenderableType:
        def column(name: str) -> Group:
            score = scores.get(name)
            told = [] if score is None else [Text(f"score {score:.3f}", style="dim")]
            return Group(Text(shown(texts[name])), *told)

        if not self.side_by_side:
            return column(next(iter(texts)))
        table = Table(expand=True)
        for name in texts:
            table.add_column(Text(shown(name)), ratio=1)
        table.add_row(*map(column, texts))
        return table


def talk_until_the_end(talk: Talk, screen: Screen, source: TextIO) -> None:
    """Answer every line, or obey it."""
    for line in screen.lines(source):
        if not line.startswith("/"):
            screen.answers(talk, line)
        elif (told := talk.command(line)) is None:
            return
        else:
            screen.say(told, style="dim")


def checked_temperature(temperature: float) -> float:
    """The temperature, or a ConfigurationError."""
    if not 0 <= temperature < float("inf"):
        raise ConfigurationError(f"--temperature must be 0 or more, got {temperature}")
    return temperature


def found_model(name: str) -> str:
    """Of a run's folder its final model, or its adapter; what is named otherwise as it is."""
    inside = [Path(name) / folder for folder in ("final", "adapter")]
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        return str(next((folder for folder in inside if folder.is_dir()), name))
    return name


def labels(names: list[str]) -> list[str]:
    """Short names that differ."""
    short = [Path(name).parent.name if Path(name).name == "final" else Path(name).name for name in names]
    return short if len(set(short)) == len(short) else [f"{number} {name}" for number, name in enumerate(names, 1)]
