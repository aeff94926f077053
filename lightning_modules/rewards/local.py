"""Scores from a local reward model: the suite's own reward stage, or one from the hub."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from datamodules.batches import TokenBatch, pad
from datamodules.chat import encode_conversation, encode_whole, load_tokenizer, tail_ids
from datamodules.chat_template import UnstableTemplateError
from datamodules.messages import Message
from lightning_modules.forward.completions import position_ids, sequence_scores
from lightning_modules.models.identity import directory_digest
from lightning_modules.models.loading import load_causal_lm, load_config, load_reward_model, most_tokens


class ModelReward:
    """Renders each conversation with the reward model's own chat template and reads one score, in batches.

    Args:
        model_name: Hub id or directory of a sequence classifier with one label.
        batch_size: Conversations per forward pass.
        max_length: Longest conversation in tokens; a longer one is NaN rather than cut.
        dtype: Of the weights; ``bfloat16`` halves the memory and rounds the scores.
        option: The option to name in an error.
    """

    def __init__(
        self,
        model_name: str,
        batch_size: int = 32,
        max_length: int = 4096,
        dtype: Literal["float32", "bfloat16"] = "float32",
        option: str = "model.reward",
    ) -> None:
        load_config(model_name, option=option)
        self.model_name = model_name
        self.name = model_name
        self.batch_size = batch_size
        self.max_length = max_length
        self.dtype = dtype
        self.option = option
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    @cached_property
    def identity(self) -> list[Any]:
        """What tells this source of scores from another."""
        return [type(self).__name__, directory_digest(self.model_name), self.max_length, self.dtype]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
        model, tokenizer = self.load()
        limit = min(self.max_length, most_tokens(model.config) or self.max_length)
        encoded = [
            conversation_ids(tokenizer, [*prompt, {"role": "assistant", "content": text}])
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        scores = [float("nan")] * len(encoded)
        fitting = sorted((i for i, ids in enumerate(encoded) if len(ids) <= limit), key=lambda i: len(encoded[i]))
        for start in range(0, len(fitting), self.batch_size):
            rows = fitting[start : start + self.batch_size]
            batch = pad(
                [encoded[row] for row in rows],
                [[False] * len(encoded[row]) for row in rows],
                pad_token_id=int(tokenizer.pad_token_id),
            )
            batch = batch.to(model.device)
            with torch.autocast(model.device.type, enabled=False):  # the same score within training and without
                batch_scores = self.read_scores(model, batch).tolist()
            for row, score in zip(rows, batch_scores, strict=True):
                scores[row] = score
        return scores

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model, on this process's device, and its tokenizer."""
        if self._loaded is None:
            tokenizer = load_tokenizer(self.model_name, option=self.option)
            with torch.inference_mode(False):  # whoever asks first may be in a validation
                model: Any = self.load_model(tokenizer)
                model.to(device="cuda" if torch.cuda.is_available() else "cpu", dtype=getattr(torch, self.dtype))
            self._loaded = model.eval().requires_grad_(False), tokenizer
        return self._loaded

    def load_model(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """The model as it is read."""
        return load_reward_model(self.model_name, tokenizer, new_head=False, option=self.option)

    def read_scores(self, model: PreTrainedModel, batch: TokenBatch) -> Float[Tensor, " batch"]:
        """One score for each row."""
        return sequence_scores(model, batch)


def conversation_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """A whole conversation and the template's tail; of a template that rewrites earlier turns what it writes."""
    try:
        return [*encode_conversation(tokenizer, messages).input_ids, *tail_ids(tokenizer)]
    except UnstableTemplateError:
        return encode_whole(tokenizer, messages).input_ids


class CausalModelReward(ModelReward):
    """A causal language model whose score is the logit of token 0 at the last position, as Nemotron-70B-Reward-HF's.

    A plain language model would be read there too, so this is never chosen by itself: name the class.

    Args:
        model_name: Hub id or directory of the model.
        batch_size: Conversations per forward pass.
        max_length: Longest conversation in tokens; a longer one is NaN rather than cut.
        dtype: Of the weights; ``bfloat16`` halves the memory and rounds the scores.
        option: The option to name in an error.
    """

    @override
    def load_model(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        return load_causal_lm(self.model_name, tokenizer, option=self.option)

    @override
    def read_scores(self, model: PreTrainedModel, batch: TokenBatch) -> Float[Tensor, " batch"]:
        last = batch.attention_mask.sum(1) - 1  # rows are padded on the right
        columns, column = last.unique(return_inverse=True)
        logits: Tensor = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=position_ids(batch.attention_mask),
            logits_to_keep=columns,
            use_cache=False,
        ).logits
        return logits[torch.arange(len(column), device=column.device), column, 0].float()
