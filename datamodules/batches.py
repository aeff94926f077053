"""What a batch is made of: the records that data modules yield and methods take, and how rows become them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from datamodules.messages import Message


class TokenBatch(NamedTuple):
    """Token sequences padded to one width; masks go by position, so a pad id may also be a real token."""

    input_ids: Int[Tensor, "batch time"]
    attention_mask: Bool[Tensor, "batch time"]
    completion_mask: Bool[Tensor, "batch time"]

    def to(self, device: torch.device | str) -> "TokenBatch":
        """The batch on a device; to a GPU without waiting, as what follows is in the same stream."""
        there = torch.device(device)
        return TokenBatch(*(tensor.to(there, non_blocking=there.type == "cuda") for tensor in self))


class PreferenceBatch(NamedTuple):
    """Pairs in one token batch of twice the rows: all chosen completions first, then all rejected."""

    tokens: TokenBatch
    reference_log_probs: Float[Tensor, " batch"] | None = None
    """What the reference gives to each row's completion, in nats, where that is known."""

    def pairs(self) -> list[int]:
        """The pair that each row belongs to; its two rows begin with the same prompt."""
        count = len(self.tokens.input_ids) // 2
        return [*range(count), *range(count)]


class PromptBatch(NamedTuple):
    """Prompts for sampling: the conversations, for reward sources, and their unpadded tokens, for the policy."""

    prompts: list[list[Message]]
    prompt_ids: list[Int[Tensor, " _"]]


def pad(
    sequences: Sequence[Sequence[int]], completion_masks: Sequence[Sequence[bool]], *, pad_token_id: int
) -> TokenBatch:
    """Right-pad token lists and their masks into one batch."""
    width = max(map(len, sequences))
    input_ids = torch.full((len(sequences), width), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    completion_mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, (ids, mask) in enumerate(zip(sequences, completion_masks, strict=True)):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = True
        completion_mask[row, : len(mask)] = torch.tensor(mask)
    return TokenBatch(input_ids, attention_mask, completion_mask)


def collate_conversations(rows: Sequence[Mapping[str, Any]], *, pad_token_id: int) -> TokenBatch:
    """Rows of ``input_ids`` and ``completion_mask``."""
    return pad([row["input_ids"] for row in rows], [row["completion_mask"] for row in rows], pad_token_id=pad_token_id)


def collate_preferences(
    rows: Sequence[Mapping[str, Any]], *, pad_token_id: int, tail_ids: Sequence[int]
) -> PreferenceBatch:
    """Rows of ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``; the template's tail follows, outside the mask."""
    sequences, masks = [], []
    for side in ("chosen_ids", "rejected_ids"):
        for row in rows:
            sequences.append([*row["prompt_ids"], *row[side], *tail_ids])
            masks.append([False] * len(row["prompt_ids"]) + [True] * len(row[side]))
    return PreferenceBatch(pad(sequences, masks, pad_token_id=pad_token_id))


def collate_prompts(rows: Sequence[Mapping[str, Any]]) -> PromptBatch:
    """Rows of ``messages`` and ``prompt_ids``."""
    return PromptBatch([row["messages"] for row in rows], [torch.tensor(row["prompt_ids"]) for row in rows])
