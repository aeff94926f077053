"""The usual formats of rows, found out from their columns, and how each becomes conversations, pairs and prompts."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from core.errors import ConfigurationError
from datamodules.messages import Message, UnusableRowError, as_messages, before_answer

Task = Literal["conversations", "preferences", "prompts"]
"""What a batch holds: whole conversations (SFT), preference pairs (DPO, reward), or prompts to sample from (RLOO)."""
Row = Mapping[str, Any]
Reader = Callable[[Row], Any]
TRANSCRIPT_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


class Format(NamedTuple):
    """A kind of rows: how it is called, the columns that tell it, and for each task that it serves what reads a row."""

    name: str
    columns: tuple[str, ...]
    readers: Mapping[Task, Reader]


def find_format(columns: Sequence[str], *, source: str, option: str = "data.columns") -> Format:
    """The format that the columns are of.

    Args:
        columns: Their names.
        source: What has them, for an error.
        option: What renames them, for an error.

    Raises:
        ConfigurationError: If they are of none, with the columns and what to do.
    """
    for form in FORMATS:
        if set(form.columns) <= set(columns):
            if form.columns == ("prompt", "completion") and "label" in columns:
                raise ConfigurationError(
                    f"{source} has unpaired answers (prompt, completion, label), and no method here learns from labels "
                    "of single answers: make pairs of them (prompt, chosen, rejected), or keep the good ones (prompt, "
                    "completion) for SFT"
                )
            return form
    near = {ours: theirs for ours, others in SYNONYMS.items() for theirs in others if theirs in columns}
    told = ", ".join(f"{ours}: {theirs}" for ours, theirs in near.items())
    raise ConfigurationError(
        f"{source} has the columns {list(columns)}, which are of no format: "
        f"{'; '.join(form.name for form in FORMATS)}. Rename them"
        + (f", perhaps with {option} {{{told}}}" if near else f" with {option}, or in the file")
    )


def as_turns(value: Any, role: str) -> Any:
    """Messages as they are, or text as one turn of a role."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return as_messages(value)
    return [{"role": role, "content": str(value)}]


def as_text(value: Any) -> str:
    """A value of a table as text; nothing as none."""
    return "" if value is None else str(value)


def read_messages(row: Row) -> Any:
    """The conversation of a column of messages."""
    return as_messages(row["messages"])


def read_sharegpt(row: Row) -> Any:
    """ShareGPT's conversation, whose row may have the system's text in a column."""
    messages = as_messages(row["conversations"])
    system = row.get("system")
    return with_system(messages, system) if isinstance(system, str) and system.strip() else messages


def read_instruction(row: Row) -> list[Message]:
    """Alpaca's: the instruction, and below it what it is about, is the user's; the output is the answer."""
    asked = "\n\n".join(filter(None, (as_text(row[name]) for name in ("instruction", "input") if name in row)))
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": as_text(row["output"])}]
    system = row.get("system")
    return with_system(turns, system) if isinstance(system, str) and system.strip() else turns  # type: ignore[no-any-return]


def read_completion(row: Row) -> Any:
    """The prompt and its completion, each as text or messages."""
    (completion,) = without_prompt(row["prompt"], [row["completion"]])
    return joined(as_turns(row["prompt"], "user"), as_turns(completion, "assistant"))


def read_pair(row: Row) -> tuple[Any, Any]:
    """Both conversations: each side holds the prompt or goes on from it, as text or messages."""
    prompt, sides = row.get("prompt"), (row["chosen"], row["rejected"])
    if not all(isinstance(side, str) for side in sides):
        chosen, rejected = (as_turns(side, "assistant") for side in sides)
        given = None if prompt is None else as_turns(prompt, "user")
        return joined(given, chosen), joined(given, rejected)
    if prompt is not None:
        chosen, rejected = (as_turns(side, "assistant") for side in without_prompt(prompt, sides))
        return joined(as_turns(prompt, "user"), chosen), joined(as_turns(prompt, "user"), rejected)
    if all(TRANSCRIPT_TURN.match(side) for side in sides):
        return read_transcript(sides[0]), read_transcript(sides[1])
    prompt = common_beginning(*sides)
    return read_pair({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]})


def read_chosen(row: Row) -> Any:
    """The conversation with the chosen answer."""
    return read_pair(row)[0]


def read_prompt(row: Row) -> Any:
    """A prompt alone, as text or messages."""
    return before_answer(as_turns(row["prompt"], "user"))


def read_text(row: Row) -> Any:
    """Plain text."""
    return row["text"]


def joined(prompt: Any, side: Any) -> Any:
    """The prompt and what goes on from it; a side that holds its prompt already stays as it is.

    Raises:
        UnusableRowError: If the side is of another prompt.
    """
    if not isinstance(side, list) or not side or prompt is None:
        return side
    if not isinstance(prompt, list):
        return prompt
    first = side[0].get("role") if isinstance(side[0], dict) else None
    if first == "assistant" or side[: len(prompt)] == prompt:
        return [*prompt, *side] if first == "assistant" else side
    if all(isinstance(turn, dict) and turn.get("role") == "system" for turn in prompt):
        return [*prompt, *side]
    asked = [turn for turn in prompt if isinstance(turn, dict) and turn.get("role") != "system"]
    if any(side[at : at + len(asked)] == asked for at in (0, 1)):  # one of the two has a system turn
        return [*prompt, *side[side.index(asked[0]) + len(asked) :]] if len(asked) < len(prompt) else side
    raise UnusableRowError("answers another prompt than its own")


def without_prompt(prompt: Any, sides: Sequence[Any]) -> list[Any]:
    """Texts without the prompt that each begins with; other sides as they are."""
    texts = [prompt, *sides]
    if prompt and all(isinstance(text, str) for text in texts) and all(side.startswith(prompt) for side in sides):
        return [side[len(prompt) :].lstrip() for side in sides]
    return list(sides)


def common_beginning(chosen: str, rejected: str) -> str:
    """What both texts begin with, up to the end of a word.

    Raises:
        UnusableRowError: If that is nothing.
    """
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    common = "".join(letter for letter, _ in alike)
    prompt = re.sub(r"\S*$", "", common).rstrip()
    if not prompt:
        raise UnusableRowError("chosen and rejected begin with no common prompt")
    return prompt


def read_transcript(text: str) -> list[Message]:
    """The turns of a text in which ``Human:`` and ``Assistant:`` open paragraphs, as in Anthropic's hh-rlhf."""
    _, *parts = TRANSCRIPT_TURN.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def with_system(messages: Any, system: str) -> Any:
    """The conversation with a system turn, where it has none."""
    if not isinstance(messages, list) or not messages:
        return messages
    first = messages[0].get("role") if isinstance(messages[0], dict) else None
    return messages if first == "system" else [{"role": "system", "content": system}, *messages]


class Read:
    """A reader and what is done to the conversations it finds; a class, so that caches know it by its parts.

    Args:
        reader: Of a format.
        system: The text of a system turn for conversations that have none.
        prompt: Whether the prompt alone is wanted.
    """

    def __init__(self, reader: Reader, *, system: str | None = None, prompt: bool = False) -> None:
        self.reader = reader
        self.system = system
        self.prompt = prompt

    def __call__(self, row: Row) -> Any:
        found = self.reader(row)
        if self.system is not None:
            one = not isinstance(found, tuple)
            found = with_system(found, self.system) if one else tuple(with_system(side, self.system) for side in found)
        return before_answer(found) if self.prompt else found


def conversations_and_prompts(reader: Reader) -> dict[Task, Reader]:
    """For rows of conversations, whose prompts are what stands before the last answer."""
    return {"conversations": reader, "prompts": Read(reader, prompt=True)}


FORMATS = (
    Format(
        "chosen + rejected (messages or text, each with its prompt or beside prompt)",
        ("chosen", "rejected"),
        {"preferences": read_pair, **conversations_and_prompts(read_chosen)},
    ),
    Format("messages", ("messages",), conversations_and_prompts(read_messages)),
    Format("conversations (ShareGPT)", ("conversations",), conversations_and_prompts(read_sharegpt)),
    Format("instruction + output (Alpaca)", ("instruction", "output"), conversations_and_prompts(read_instruction)),
    Format("prompt + completion", ("prompt", "completion"), conversations_and_prompts(read_completion)),
    Format("prompt", ("prompt",), {"prompts": read_prompt}),
    Format("text", ("text",), {"conversations": read_text}),
)
"""In the order in which they are looked for: the one that says most of a row first."""

SYNONYMS = {
    "prompt": ("question", "query", "instruction", "input", "user"),
    "completion": ("answer", "response", "output", "target", "assistant"),
    "chosen": ("preferred", "accepted", "win", "better"),
    "rejected": ("dispreferred", "refused", "lose", "worse"),
    "messages": ("conversation", "dialog", "dialogue", "turns", "chat"),
    "text": ("content", "document", "body"),
}
