"""Scores from a local sequence-classification model: the suite's own reward stage, or one from the hub."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.batches import pad
from datamodules.chat import Message, encode_conversation, load_tokenizer, tail_ids
from lightning_modules.forward import sequence_scores
from lightning_modules.loading import load_config, load_reward_model


class ModelReward:
    """Renders each conversation with the reward model's own chat template and reads one score, in batches.

    Args:
        model_name: Hub id or directory of a sequence classifier with one label.
        batch_size: Conversations per forward pass.
        max_length: Longest conversation in tokens; a longer one is NaN rather than cut.
        option: The option to name in an error.
    """

    def __init__(
        self, model_name: str, batch_size: int = 32, max_length: int = 4096, option: str = "model.reward"
    ) -> None:
        load_config(model_name, option=option)
        self.model_name = model_name
        self.name = model_name
        self.batch_size = batch_size
        self.max_length = max_length
        self.option = option
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[float]:
        model, tokenizer = self.load()
        limit = min(self.max_length, getattr(model.config, "max_position_embeddings", None) or self.max_length)
        tail = tail_ids(tokenizer)
        encoded = [
            [*encode_conversation(tokenizer, [*prompt, {"role": "assistant", "content": text}]).input_ids, *tail]
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
            batch = type(batch)(*(tensor.to(model.device) for tensor in batch))
            with torch.autocast(model.device.type, enabled=False):  # the same score within training and without
                batch_scores = sequence_scores(model, batch).tolist()
            for row, score in zip(rows, batch_scores, strict=True):
                scores[row] = score
        return scores

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model, on this process's device, and its tokenizer."""
        if self._loaded is None:
            tokenizer = load_tokenizer(self.model_name)
            with torch.inference_mode(False):  # whoever asks first may be in a validation
                model: Any = load_reward_model(self.model_name, tokenizer, new_head=False, option=self.option)
                model.to("cuda" if torch.cuda.is_available() else "cpu")
            self._loaded = model.eval().requires_grad_(False), tokenizer
        return self._loaded
