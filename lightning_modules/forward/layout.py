"""Padded rows laid flat: every attended token once, and where the rows share their beginning, that only once too.

Two completions of one prompt, `p p p a a` and `p p p b`, become one row of three segments::

    tokens     p p p | a a | b       what is multiplied: 6 tokens, of 10 in the padded batch
    positions  0 1 2 | 3 4 | 3       as in the rows that they are from, so that rotary embeddings are the same
    prefixes   none    0     0       what a segment attends to before itself

A layer's multiplications and norms work token by token and need know nothing of this; attention alone does, and gets
the segments (``forward/attention.py``). Gradients of the shared tokens then add up by themselves, since both
completions read the same states. Padding on either side, or none, gives the same flat row.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from datamodules.batches import TokenBatch


class Segments:
    """Runs of tokens that each attend to themselves, token by token, and before that perhaps to a whole other run.

    Args:
        lengths: Tokens of each, in the order in which they stand.
        prefixes: Which segment comes before each one in its row; None where it opens the row.
        device: Of the tensors below, which are made when first asked for and serve every layer.
    """

    def __init__(self, lengths: Sequence[int], prefixes: Sequence[int | None], device: torch.device) -> None:
        self.lengths = list(lengths)
        self.prefixes = list(prefixes)
        self.device = device
        before = [0 if prefix is None else self.lengths[prefix] for prefix in self.prefixes]
        self.key_lengths = [own + prefix for own, prefix in zip(self.lengths, before, strict=True)]

    @cached_property
    def masks(self) -> list[Bool[Tensor, "query key"] | None]:
        """What each segment with a prefix may see of the prefix and itself; both end together."""
        return [
            None
            if prefix is None
            else torch.ones(own, keys, dtype=torch.bool, device=self.device).tril(self.lengths[prefix])
            for own, keys, prefix in zip(self.lengths, self.key_lengths, self.prefixes, strict=True)
        ]

    @cached_property
    def bounds(self) -> tuple[Int[Tensor, " bound"], Int[Tensor, " bound"]]:
        """Where each segment's queries and its keys begin, and at the end their number."""
        queries, keys = (
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(self.device)
            for lengths in (self.lengths, self.key_lengths)
        )
        return queries, keys

    @cached_property
    def key_index(self) -> Int[Tensor, " key"] | None:
        """The tokens that each segment's keys are of, one segment behind the other; None where it is all in order."""
        if not any(prefix is not None for prefix in self.prefixes):
            return None
        starts = [0, *accumulate(self.lengths)]
        parts = [part for i, prefix in enumerate(self.prefixes) for part in (prefix, i) if part is not None]
        return torch.cat([torch.arange(starts[part], starts[part + 1]) for part in parts]).to(self.device)


class FlatBatch(NamedTuple):
    """Rows without padding, one behind the other, in segments."""

    input_ids: Int[Tensor, "1 flat"]
    position_ids: Int[Tensor, "1 flat"]
    segments: Segments
    flat_index: Int[Tensor, " attended"]
    """Where each attended token of the padded batch went, rows in reading order."""
    longest: int
    """Tokens of the longest row."""


def position_ids(attention_mask: Bool[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """Positions that count attended tokens alone, so that padding on either side changes nothing."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def flatten(batch: TokenBatch, groups: Sequence[int] | None = None) -> FlatBatch:
    """Lay a batch flat.

    Args:
        batch: Padded on either side.
        groups: A number for each row. The tokens that all rows of a number begin with are kept once, in the first of
            them; the others attend to them there.
    """
    mask = batch.attention_mask
    row = mask.nonzero()[:, 0]
    ids, positions = batch.input_ids[mask], position_ids(mask)[mask]
    lengths: list[int] = mask.sum(1).tolist()
    leaders = list(range(len(lengths))) if groups is None else [list(groups).index(group) for group in groups]
    shared = _shared_lengths(ids, row, positions, lengths, leaders)

    segments: list[tuple[int, int | None]] = []
    starts, prefixes = [], {}
    offset = 0
    for i, (length, leader) in enumerate(zip(lengths, leaders, strict=True)):
        starts.append(offset)
        if leader == i and shared[i]:
            prefixes[i] = len(segments)
            segments.append((shared[i], None))
        if length > shared[i]:  # a row that is all prefix has no segment of its own
            segments.append((length - shared[i], prefixes.get(leader)))
        offset += length if leader == i else length - shared[i]

    device = mask.device
    # Row i's own tokens stand from starts[i] on; a follower's shared ones stand in its leader.
    first_own = torch.tensor([0 if leader == i else shared[i] for i, leader in enumerate(leaders)], device=device)[row]
    own = torch.tensor(starts, device=device)[row] + positions - first_own
    in_leader = torch.tensor([starts[leader] for leader in leaders], device=device)[row] + positions
    kept = positions >= first_own
    return FlatBatch(
        input_ids=ids[kept].unsqueeze(0),
        position_ids=positions[kept].unsqueeze(0),
        segments=Segments([n for n, _ in segments], [prefix for _, prefix in segments], device),
        flat_index=torch.where(kept, own, in_leader),
        longest=max(lengths),
    )


def _shared_lengths(
    ids: Int[Tensor, " attended"],
    row: Int[Tensor, " attended"],
    positions: Int[Tensor, " attended"],
    lengths: Sequence[int],
    leaders: Sequence[int],
) -> list[int]:
    """For each row, how many tokens all rows with the same leader begin with; 0 for a row alone."""
    if len(set(leaders)) == len(leaders):
        return [0] * len(leaders)
    # Rows side by side from their first token on, then how far each agrees with its leader: up to the first difference.
    aligned = ids.new_full((len(lengths), max(lengths)), -1)
    aligned[row, positions] = ids
    leader_of = torch.tensor(leaders, device=ids.device)
    alike = (aligned == aligned[leader_of]).long().cumprod(1).sum(1).tolist()  # padding equals padding
    shared: dict[int, int] = {}
    for i, leader in enumerate(leaders):
        shared[leader] = min(shared.get(leader, lengths[leader]), alike[i], lengths[i])
    alone = {leader for leader in leaders if list(leaders).count(leader) == 1}
    return [0 if leader in alone else shared[leader] for leader in leaders]


def model_inputs(flat: FlatBatch) -> dict[str, Any]:
    """What a model takes; a mask of four dimensions keeps transformers from making its own."""
    return {
        "input_ids": flat.input_ids,
        "position_ids": flat.position_ids,
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=flat.input_ids.device),
        "flat_segments": flat.segments,
        "use_cache": False,
    }
