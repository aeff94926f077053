"""Held-out prompts for the evaluation, from any dataset of conversations, pairs or plain prompts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from core.errors import ConfigurationError
from datamodules.chat import encode_conversation
from datamodules.formats import FORMATS, Reader, find_format
from datamodules.messages import Message, UnusableRowError, flaw, uses_tools
from datamodules.rendering import TemplateRefusalError
from datamodules.source import load_rows, renamed

OPTION = "evaluation.dataset_name"


class Prompt(NamedTuple):
    """A conversation that ends with a user turn, its length in tokens, and where its dataset has it from."""

    messages: list[Message]
    tokens: int
    source: str | None


def unfit(messages: Any) -> str:
    """Why this is no conversation that ends with a question; empty where it is one."""
    if reason := flaw(messages):
        return reason
    if any(uses_tools(messages)):
        return "uses tools"
    return "" if messages[-1]["role"] == "user" else "no question at the end"


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, messages: Any) -> tuple[int, str]:
    """How many tokens a prompt has, and why it is none; empty where it is one."""
    if reason := unfit(messages):
        return 0, reason
    try:
        return len(encode_conversation(tokenizer, messages, add_generation_prompt=True).input_ids), ""
    except TemplateRefusalError as refusal:
        return 0, f"refused by the chat template ({refusal.reason[:80]})"


def load_prompts(
    dataset_name: str,
    split: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    max_length: int,
    columns: Mapping[str, str] | None = None,
    held_out: tuple[Dataset, Reader] | None = None,
) -> list[Prompt]:
    """The first ``count`` distinct prompts of a split that have at most ``max_length`` tokens.

    Args:
        dataset_name: Hub id, directory or file, in any of the usual formats.
        split: The split's name; of a single file all rows are taken.
        tokenizer: The policy's.
        count: How many at most.
        max_length: Of a prompt, in tokens.
        columns: What the dataset calls columns that have other names there.
        held_out: Or the rows that training leaves out, where it is on the same dataset, and what reads them.

    Raises:
        ConfigurationError: If the dataset has no prompts, or none that can be used, with the reasons.
    """
    rows, readers = (held_out[0], [held_out[1]]) if held_out else _prompt_rows(dataset_name, split, columns or {})
    prompts: list[Prompt] = []
    passed_over: Counter[str] = Counter()
    seen: set[str] = set()
    for row in rows:
        if len(prompts) == count:
            break
        messages, reason = read_prompt(row, readers)
        if not reason and str(messages) in seen:
            continue
        tokens, reason = (0, reason) if reason else prompt_tokens(tokenizer, messages)
        if reason or tokens > max_length:
            passed_over[reason or f"longer than {max_length} tokens"] += 1
            continue
        seen.add(str(messages))
        source = row.get("source")
        prompts.append(Prompt(messages, tokens, source if isinstance(source, str) else None))
    listed = ", ".join(f"{number} {reason}" for reason, number in sorted(passed_over.items()))
    if not prompts:
        raise ConfigurationError(
            f"no row of {dataset_name} {split} is a prompt to evaluate on ({listed}); change {OPTION}, or "
            "evaluation.max_prompt_length"
        )
    if passed_over:
        rank_zero_info(f"{dataset_name} {split}: passed over {sum(passed_over.values())} rows for prompts ({listed})")
    return prompts


def read_prompt(row: Mapping[str, Any], readers: Sequence[Reader]) -> tuple[Any, str]:
    """The row's prompt as the first of the readers finds one, and why there is none; empty where there is."""
    reasons = []
    for read in readers:
        try:
            messages = read(row)
        except UnusableRowError as flawed:
            reasons.append(str(flawed))
            continue
        if not (reason := unfit(messages)):
            return messages, ""
        reasons.append(reason)
    return None, reasons[0]


def _prompt_rows(dataset_name: str, split: str, columns: Mapping[str, str]) -> tuple[Dataset, list[Reader]]:
    """The rows, and a reader for each format that they are of: a row may have nothing in the columns of one."""
    rows = load_rows(dataset_name, split, columns=list(columns.values()), held_out=None, option=OPTION)
    rows = renamed(rows, columns)
    form = find_format(rows.column_names, source=dataset_name, option="evaluation.columns")
    if "prompts" not in form.readers:
        raise ConfigurationError(f"{dataset_name} has rows of {form.name}, which hold no prompts; change {OPTION}")
    fitting = [form for form in FORMATS if set(form.columns) <= set(rows.column_names)]
    return rows, [form.readers["prompts"] for form in fitting if "prompts" in form.readers]
