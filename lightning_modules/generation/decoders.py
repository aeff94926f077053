"""How a model completes prompts: its own decode step where the architecture is known, else transformers' forward."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from typing_extensions import override

from core.memory import free_bytes
from lightning_modules.forward.completions import position_ids
from lightning_modules.generation.family_decoder import FamilyDecoder, compute_dtype
from lightning_modules.models.adapters import merges
from lightning_modules.models.sharding import go_on, sharding_of

FAMILY = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose frequencies do not depend on the sequence's length."""


@runtime_checkable
class Decoder(Protocol):
    """Prompts being completed, ``samples_per_prompt`` neighbouring rows each."""

    def start(self) -> Float[Tensor, "batch vocab"]:
        """Read each prompt once, and give its samples the distribution of their first token."""

    def step(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        """Append a token to each row, and give the distribution of the next one."""

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with these rows alone, in this order."""


def decodes(model: PreTrainedModel) -> bool:
    """Whether the architecture is exactly the one that ``FamilyDecoder`` computes."""
    if type(model) not in FAMILY:
        return False
    config = model.config
    rope = config.rope_parameters
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    windowed = isinstance(model, MistralForCausalLM) and config.sliding_window is not None
    return (
        rope["rope_type"] in FIXED_ROTATIONS
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and set(kinds) == {"full_attention"}
        and not windowed
        and all(merges(linear) for linear in _projections(model))  # no quantisation
        and type(model.lm_head) is nn.Linear
        and all(type(parameter) is nn.Parameter for parameter in model.parameters())  # nothing quantised or sharded
        and {parameter.device for parameter in model.parameters()} == {model.device}
    )


def _projections(model: Any) -> list[Any]:
    """The linear layers of the body."""
    parts = [part for layer in model.model.layers for part in (layer.self_attn, layer.mlp)]
    return [module for part in parts for name, module in part.named_children() if name.endswith("_proj")]


def decoder(
    model: PreTrainedModel,
    prompt_ids: Sequence[Int[Tensor, " _"]],
    *,
    samples_per_prompt: int,
    max_completion_length: int,
) -> Decoder:
    """The fastest decoder that computes what the model computes."""
    if sharding_of(model) is not None:
        return ShardedDecoder(model, prompt_ids, samples_per_prompt=samples_per_prompt)
    if decodes(model) and has_room(model):
        return FamilyDecoder(
            model, prompt_ids, samples_per_prompt=samples_per_prompt, max_completion_length=max_completion_length
        )
    return TransformersDecoder(model, prompt_ids, samples_per_prompt=samples_per_prompt)


def has_room(model: PreTrainedModel) -> bool:
    """Whether the GPU has room for the decoder's own weights, where it needs any; a CPU's memory is not looked at."""
    needed, free = copied_bytes(model), free_bytes(model.device)
    if needed <= free:
        return True
    rank_zero_warn(
        f"sampling goes through transformers' forward, which is slower: the decoder's own weights would take "
        f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; a smaller data.batch_size makes room"
    )
    return False


def copied_bytes(model: Any) -> int:
    """What :func:`lightning_modules.generation.projections.projection` makes of the weights: copies, or nothing."""
    dtype = compute_dtype(model)
    linears = [*_projections(model), model.lm_head]
    copied = [layer for layer in linears if hasattr(layer, "lora_A") or layer.weight.dtype != dtype]
    return int(sum(layer.weight.numel() for layer in copied)) * dtype.itemsize


class TransformersDecoder:
    """Any causal language model of transformers, with a cache that grows and prompts that are padded on the left."""

    def __init__(
        self, model: PreTrainedModel, prompt_ids: Sequence[Int[Tensor, " _"]], *, samples_per_prompt: int
    ) -> None:
        self.model = model
        self.prompt_ids = prompt_ids
        self.samples_per_prompt = samples_per_prompt
        self.cache = DynamicCache(config=model.config)

    def start(self) -> Float[Tensor, "batch vocab"]:
        """Read each prompt once, and give its samples the distribution of their first token."""
        ids, self.attention_mask = left_padded(self.prompt_ids, pad_token_id=0)
        ids, self.attention_mask = ids.to(self.model.device), self.attention_mask.to(self.model.device)
        self.positions = position_ids(self.attention_mask)
        logits = self._forward(ids)
        rows = torch.arange(len(ids), device=ids.device).repeat_interleave(self.samples_per_prompt)
        if self.samples_per_prompt > 1:
            self.keep(rows)
        return logits[rows]

    def step(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        """Append a token to each row, and give the distribution of the next one."""
        self.attention_mask = torch.nn.functional.pad(self.attention_mask, (0, 1), value=True)
        self.positions = self.positions[:, -1:] + 1
        return self._forward(tokens.unsqueeze(1))

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with these rows alone, in this order."""
        self.cache.reorder_cache(rows)  # type: ignore[arg-type]  # the one of its methods that every kind of layer has
        self.attention_mask, self.positions = self.attention_mask[rows], self.positions[rows]

    def _forward(self, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch vocab"]:
        logits: Tensor = self.model(
            input_ids=ids,
            attention_mask=self.attention_mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            logits_to_keep=1,
            use_cache=True,
        ).logits
        return logits[:, -1]


class ShardedDecoder(TransformersDecoder):
    """The same of a model that is too large for a device: all who share it make every pass together."""

    @override
    def _forward(self, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch vocab"]:
        go_on(self.model)
        return super()._forward(ids)


def left_padded(
    prompt_ids: Sequence[Int[Tensor, " _"]], *, pad_token_id: int
) -> tuple[Int[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
    """The prompts side by side with their ends aligned, and where they stand."""
    width = max(map(len, prompt_ids))
    ids = torch.full((len(prompt_ids), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros(len(prompt_ids), width, dtype=torch.bool)
    for row, prompt in enumerate(prompt_ids):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = True
    return ids, mask
