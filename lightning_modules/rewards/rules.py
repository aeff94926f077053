"""Rewards that a rule computes: simple ones for trials, and examples of how to write your own."""

from collections.abc import Sequence

from datamodules.messages import Message


def brevity(prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
    """Minus the number of characters: the shorter, the better."""
    return [-float(len(text)) for text in completions]


class Mentions:
    """How often a completion uses a word, as a share of its words.

    Args:
        word: The word to look for, whatever its case.
    """

    def __init__(self, word: str) -> None:
        self.word = word.lower()
        self.name = f"mentions {word}"

    def __call__(self, prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
        words = [text.lower().split() for text in completions]
        return [sum(word.strip(".,!?;:\"'") == self.word for word in row) / max(1, len(row)) for row in words]
