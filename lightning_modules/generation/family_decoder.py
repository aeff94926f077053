"""A decode step of our own for the Llama and Qwen family: one token a row, without transformers' cost a layer.

Why: a step of a small model is some hundred small operations, and transformers' Python between them takes longer than
they do; its cache grows by copying, and its numbers depend on the padding. Here the cache is made once at its final
length, so that nothing is copied and a CUDA graph can replay a step (``cuda_graphs.py``), and a row's sums are taken
over whole blocks of fixed width, so that they are the same to the last bit whatever stands beside it: a seed then
gives the same completion in every batch, which the evaluation's cache and the tests rely on. What is not exactly this
family goes another way (``decoders.py``).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from lightning_modules.generation.cuda_graphs import StepGraphs
from lightning_modules.generation.projections import Projection, projection

BLOCK = 128
"""Cached tokens that attention reads together: a row's sums are then the same however long the rows beside it are."""


Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""From a layer's storage, the new queries, keys and values, and the scaling to what the queries attend to."""


class Layer(NamedTuple):
    """What a decode step needs of a transformer layer."""

    attention_norm: nn.Module
    query_key_value: Projection
    query_norm: nn.Module | None
    """Of each head, as Qwen3 has one; the keys then have theirs."""
    key_norm: nn.Module | None
    output: Projection
    mlp_norm: nn.Module
    gate_up: Projection
    activation: nn.Module
    down: Projection
    scaling: float


class FamilyDecoder:
    """Completes prompts token by token; see ``decoders.Decoder``.

    Keys and values stand in storage of the final length, a row's token t in place t, so that a row's numbers depend
    on neither padding nor the rows beside it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompt_ids: Sequence[Int[Tensor, " _"]],
        *,
        samples_per_prompt: int,
        max_completion_length: int,
    ) -> None:
        config, device = model.config, model.device
        self.model = model
        self.prompt_ids = prompt_ids
        self.samples_per_prompt = samples_per_prompt
        self.dtype = compute_dtype(model)
        lengths = torch.tensor([len(prompt) for prompt in prompt_ids]).repeat_interleave(samples_per_prompt)
        self.longest = int(lengths.max())
        self.positions = lengths.to(device)
        """Where the row's next token goes."""
        self.head_dim = int(model.model.layers[0].self_attn.head_dim)
        self.head_counts = (config.num_attention_heads, config.num_key_value_heads)
        capacity = _whole_blocks(self.longest + max_completion_length)
        shape = (config.num_hidden_layers, 2, len(lengths), self.head_counts[1], capacity, self.head_dim)
        self.cache = torch.zeros(shape, dtype=self.dtype, device=device)  # zeros: NaN would pass through the mask
        self.rotation = _rotation(model, capacity)
        self.layers = [_layer(layer, self.dtype) for layer in model.model.layers]
        self.head = projection([model.lm_head], self.dtype)
        self.graphs = StepGraphs()  # is told the step each time: knowing it, it would keep this object alive

    def start(self) -> Float[Tensor, "batch vocab"]:
        """Read each prompt once, and give its samples the distribution of their first token."""
        # One by one where there are few cores: as fast, and no prompt's numbers depend on another prompt's length.
        total = len(self.prompt_ids)
        count = 1 if self.model.device.type == "cpu" else total
        parts = [self._read(first, self.prompt_ids[first : first + count]) for first in range(0, total, count)]
        return torch.cat(parts).repeat_interleave(self.samples_per_prompt, dim=0)

    def _read(self, first: int, prompts: Sequence[Tensor]) -> Float[Tensor, "prompt vocab"]:
        """Prompts laid end to end, attention within each; those of like length attend in one call."""
        lengths = [len(prompt) for prompt in prompts]
        device = self.model.device
        groups = [side_by_side(lengths, numbers, device) for numbers in of_like_length(lengths)]

        def attend(storage: Tensor, query: Tensor, key_value: Tensor, scaling: float) -> Tensor:
            attended = query.new_empty(len(query), query[0].numel())
            by_prompt = storage.unflatten(1, (-1, self.samples_per_prompt))
            for group in groups:
                keys, values = written = key_value[group.at].permute(2, 0, 3, 1, 4)
                # What comes to stand behind a prompt's end is not looked at before it is overwritten.
                by_prompt[:, first + group.numbers, :, :, : keys.shape[2]] = written.unsqueeze(2)
                heads = _attend_causally(query[group.at], keys, values, scaling=scaling)
                attended[group.tokens] = heads.flatten(0, 1)[group.places]
            return attended

        positions = torch.cat([torch.arange(length, device=device) for length in lengths])
        hidden = self._run(torch.cat([prompt.to(device) for prompt in prompts]), positions, attend)
        return self.head(hidden[torch.tensor(lengths, device=device).cumsum(0) - 1])

    def step(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        """Append a token to each row, and give the distribution of the next one."""
        self.longest += 1
        logits = self.graphs.run(self.forward, tokens, self.positions, _whole_blocks(self.longest))
        self.positions = self.positions + 1
        return logits

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with these rows alone, in this order; a row that stays in its place costs nothing."""
        places = torch.arange(len(rows), device=rows.device)
        moved = rows != places
        if moved.any():
            # Indexing makes a copy of what is read before it is written, so overlapping moves are safe.
            used = self.cache[..., : self.longest, :]
            used[:, :, places[moved]] = used[:, :, rows[moved]]
        self.cache = self.cache[:, :, : len(rows)]
        self.positions = self.positions[rows]
        self.longest = int(self.positions.max())

    def forward(
        self, tokens: Int[Tensor, " batch"], positions: Int[Tensor, " batch"], width: int
    ) -> Float[Tensor, "batch vocab"]:
        """One token a row at its position, with ``width`` cached places in sight of the mask."""
        seen = torch.arange(width, device=tokens.device) <= positions.unsqueeze(1)
        mask = torch.zeros_like(seen, dtype=self.dtype).masked_fill_(~seen, -torch.inf)[:, None, None]
        rows = torch.arange(len(tokens), device=tokens.device)

        def attend(storage: Tensor, query: Tensor, key_value: Tensor, scaling: float) -> Tensor:
            storage[:, rows, :, positions] = key_value
            return _attend(query, storage[0], storage[1], mask, scaling=scaling)

        return self.head(self._run(tokens, positions, attend))

    def _run(
        self, tokens: Int[Tensor, " token"], positions: Int[Tensor, " token"], attend: Attention
    ) -> Float[Tensor, "token hidden"]:
        """All layers, without the head."""
        base = self.model.model
        with torch.autocast(tokens.device.type, enabled=False):  # the casts that it would do are made here
            hidden = base.embed_tokens(tokens)
            rotation = [table[positions].unsqueeze(1) for table in self.rotation]
            for layer, storage in zip(self.layers, self.cache, strict=True):
                states = layer.query_key_value(layer.attention_norm(hidden)).unflatten(-1, (-1, self.head_dim))
                attended = attend(storage, *self._rotated(layer, states, rotation), layer.scaling)
                hidden = hidden + layer.output(attended)
                gate, up = layer.gate_up(layer.mlp_norm(hidden)).chunk(2, dim=-1)
                hidden = hidden + layer.down(layer.activation(gate) * up)
            normed: Tensor = base.norm(hidden)
        return normed

    def _rotated(
        self, layer: Layer, states: Float[Tensor, "batch head dim"], rotation: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Queries as [batch, key head, query head of it, dim], keys and values as [batch, 2, key head, dim]."""
        queries, keys = self.head_counts
        turned, values = states[:, : queries + keys], states[:, queries + keys :]
        if layer.query_norm is not None and layer.key_norm is not None:
            turned = torch.cat([layer.query_norm(turned[:, :queries]), layer.key_norm(turned[:, queries:])], dim=1)
        cos, sin = rotation
        # (a, b) turned is (a cos - b sin, b cos + a sin): a half turn of the head swaps a and b, and the sines of the
        # first half carry the minus, so that one roll does what transformers does with a negation and a concatenation.
        turned = (turned * cos + turned.roll(self.head_dim // 2, dims=-1) * sin).to(self.dtype)
        key_value = torch.stack([turned[:, queries:], values], dim=1)
        return turned[:, :queries].unflatten(1, (keys, -1)), key_value


def _layer(layer: Any, dtype: torch.dtype) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        attention_norm=layer.input_layernorm,
        query_key_value=projection([attention.q_proj, attention.k_proj, attention.v_proj], dtype),
        query_norm=getattr(attention, "q_norm", None),
        key_norm=getattr(attention, "k_norm", None),
        output=projection([attention.o_proj], dtype),
        mlp_norm=layer.post_attention_layernorm,
        gate_up=projection([mlp.gate_proj, mlp.up_proj], dtype),
        activation=mlp.act_fn,
        down=projection([mlp.down_proj], dtype),
        scaling=attention.scaling,
    )


class SideBySide(NamedTuple):
    """Prompts of a group padded on the right, where a causal mask alone keeps a token from what is behind it."""

    numbers: Int[Tensor, " prompt"]
    """Which of the prompts they are."""
    at: Int[Tensor, "prompt time"]
    """The flat token of each place; in the padding some token or other."""
    places: Int[Tensor, " token"]
    """Those that are no padding, counted through all rows."""
    tokens: Int[Tensor, " token"]
    """The flat tokens at these places."""


def of_like_length(lengths: Sequence[int]) -> list[list[int]]:
    """The numbers of prompts in groups, in each of which at most half would be padding."""
    groups: list[list[int]] = []
    total = 0
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and lengths[number] * (len(groups[-1]) + 1) <= 2 * (total + lengths[number]):
            groups[-1].append(number)
            total += lengths[number]
        else:
            groups.append([number])
            total = lengths[number]
    return groups


def side_by_side(lengths: Sequence[int], numbers: Sequence[int], device: torch.device) -> SideBySide:
    """Where the tokens of some of the prompts are, which lie end to end."""
    ends = torch.tensor(lengths).cumsum(0)
    of_group = torch.tensor(numbers)
    own = torch.tensor(lengths)[of_group].unsqueeze(1)
    steps = torch.arange(int(own.max()))
    at = (ends[of_group].unsqueeze(1) - own + steps).clamp(max=int(ends[-1]) - 1)
    places = (steps < own).flatten().nonzero().squeeze(1)
    return SideBySide(*(part.to(device) for part in (of_group, at, places, at.flatten()[places])))


def _attend_causally(
    query: Float[Tensor, "prompt time key_head group dim"],
    keys: Float[Tensor, "prompt key_head time dim"],
    values: Float[Tensor, "prompt key_head time dim"],
    *,
    scaling: float,
) -> Float[Tensor, "prompt time hidden"]:
    queries = query.flatten(2, 3).transpose(1, 2)
    heads = scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scaling, enable_gqa=True)
    return heads.transpose(1, 2).flatten(2)


def _attend(
    query: Float[Tensor, "batch key_head group dim"],
    keys: Float[Tensor, "batch key_head capacity dim"],
    values: Float[Tensor, "batch key_head capacity dim"],
    mask: Float[Tensor, "batch 1 1 width"],
    *,
    scaling: float,
) -> Float[Tensor, "batch hidden"]:
    width = mask.shape[-1]
    if query.dtype != torch.float32 or query.device.type != "cpu":
        heads = scaled_dot_product_attention(query, keys[:, :, :width], values[:, :, :width], mask, scale=scaling)
        return heads.flatten(1)
    # Matrix libraries split a long sum at places that depend on its length, so sums are of one block each.
    grouped, keys, values = query.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1)
    blocks = [slice(first, first + BLOCK) for first in range(0, width, BLOCK)]
    scores = torch.cat([torch.bmm(grouped, keys[:, block].mT) for block in blocks], dim=-1)
    weights = (scores.view(*query.shape[:3], width) * scaling + mask).softmax(-1).flatten(0, 1)
    summed = torch.bmm(weights[..., blocks[0]], values[:, blocks[0]])
    for block in blocks[1:]:
        summed = torch.baddbmm(summed, weights[..., block], values[:, block])
    return summed.view(len(query), -1)


def _rotation(model: PreTrainedModel, capacity: int) -> tuple[Float[Tensor, "time dim"], Float[Tensor, "time dim"]]:
    """The model's own cosines and sines; the sines signed for a half turn of the head in place of a negation."""
    positions = torch.arange(capacity, device=model.device).unsqueeze(0)
    cos, sin = model.model.rotary_emb(model.model.embed_tokens.weight[:1], positions)
    first, second = sin[0].chunk(2, dim=-1)
    return cos[0], torch.cat([-first, second], dim=-1)


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """What the linear layers of a training forward would compute in here and now."""
    kind = model.device.type
    dtype: torch.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    return dtype


def _whole_blocks(length: int) -> int:
    return -(-length // BLOCK) * BLOCK
