"""Six kinds of short instructions in several wordings, each with one right answer that a rule works out."""

import random
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

WORDS = (
    "apple river stone cloud tiger piano window garden silver candle forest rocket bridge mirror pepper basket"
).split()
OPPOSITES = {
    first: second
    for pair in (
        "hot cold, big small, fast slow, up down, day night, wet dry, old new, hard soft, full empty, early late, "
        "light dark, happy sad"
    ).split(", ")
    for first, second in (pair.split(), reversed(pair.split()))
}
PLACES = {"first": 0, "last": -1}
NUMBER_WORDS = {"two": 2, "three": 3, "four": 4, "five": 5}


class Kind(NamedTuple):
    """A kind of instruction: its wordings, how its fields are drawn, and the answer to them."""

    name: str
    wordings: tuple[str, ...]
    draw: Callable[[random.Random], dict[str, str]]
    answer: Callable[[Mapping[str, str]], str]


def _some_words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.sample(WORDS, rng.randint(low, high)))


def _pick(fields: Mapping[str, str]) -> str:
    return fields["words"].split()[PLACES[fields["place"]]]


KINDS = (
    Kind(
        "repeat",
        ("Say {word} {times} times.", "Repeat the word {word} {times} times.", "Write {word}, {times} times in a row."),
        lambda rng: {"word": rng.choice(WORDS), "times": rng.choice(list(NUMBER_WORDS))},
        lambda fields: " ".join([fields["word"]] * NUMBER_WORDS[fields["times"]]),
    ),
    Kind(
        "count",
        ("How many words are here: {words}?", "Count the words: {words}.", "Tell me the number of words in: {words}."),
        lambda rng: {"words": _some_words(rng, 2, 6)},
        lambda fields: str(len(fields["words"].split())),
    ),
    Kind(
        "opposite",
        (
            "What is the opposite of {word}, {name}?",
            "{name}, give the opposite of {word}.",
            "Not {word} but what, {name}?",
        ),
        lambda rng: {"word": rng.choice(list(OPPOSITES)), "name": rng.choice(WORDS)},
        lambda fields: OPPOSITES[fields["word"]],
    ),
    Kind(
        "pick",
        ("Which word is {place}: {words}?", "Take the {place} word of: {words}.", "Of {words}, which one is {place}?"),
        lambda rng: {"place": rng.choice(list(PLACES)), "words": _some_words(rng, 3, 4)},
        _pick,
    ),
    Kind(
        "after",
        ("Which number comes after {number}?", "Count on from {number}.", "What is one more than {number}?"),
        lambda rng: {"number": str(rng.randint(0, 98))},
        lambda fields: str(int(fields["number"]) + 1),
    ),
    Kind(
        "reverse",
        ("Write backwards: {words}.", "Turn the order round: {words}.", "Reverse these words: {words}."),
        lambda rng: {"words": _some_words(rng, 2, 4)},
        lambda fields: " ".join(reversed(fields["words"].split())),
    ),
)


class Exercise(NamedTuple):
    """An instruction and its right answer."""

    kind: str
    prompt: str
    answer: str


def draw_exercise(rng: random.Random) -> Exercise:
    """A random instruction of a random kind."""
    kind = rng.choice(KINDS)
    fields = kind.draw(rng)
    return Exercise(kind.name, rng.choice(kind.wordings).format(**fields), kind.answer(fields))


def wrong_answer(exercise: Exercise, rng: random.Random) -> str:
    """An answer that looks right and is not: a neighbouring number, or a word too many, too few or elsewhere."""
    words = exercise.answer.split()
    while True:
        changed = list(words)
        position = rng.randrange(len(words))
        change = rng.choice(("replace", "drop", "double", "swap"))
        if words[position].isdigit():
            changed[position] = str(max(0, int(words[position]) + rng.choice((-10, -2, -1, 1, 2, 10))))
        elif change == "replace":
            changed[position] = rng.choice(WORDS if exercise.kind != "opposite" else list(OPPOSITES))
        elif change == "drop" and len(words) > 1:
            del changed[position]
        elif change == "double":
            changed.insert(position, words[position])
        else:
            rng.shuffle(changed)
        if changed != words:
            return " ".join(changed)


def _pattern(wording: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", wording)
    return re.compile("".join(f"(?P<{part}>.+?)" if i % 2 else re.escape(part) for i, part in enumerate(parts)))


_PATTERNS = [(kind, _pattern(wording)) for kind in KINDS for wording in kind.wordings]


def right_answer(prompt: str) -> str | None:
    """The right answer to an instruction, worked out from its text; None for any other text."""
    for kind, pattern in _PATTERNS:
        match = pattern.fullmatch(prompt)
        if match is not None:
            try:
                return kind.answer(match.groupdict())
            except (KeyError, ValueError, IndexError):
                continue
    return None
