"""A reward model behind vLLM, started with ``vllm serve MODEL --runner pooling``."""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from datamodules.chat import load_tokenizer
from datamodules.chat_template import without_special_tokens
from datamodules.messages import Message
from datamodules.rendering import render
from lightning_modules.rewards.http import HTTPReward

CONTROL = re.compile(r"<\|[a-z_]+\|>")
"""Control tokens as nearly all templates write them; a completion that spells one must not open a turn."""


class VLLMReward(HTTPReward):
    """Asks vLLM's ``/pooling`` or ``/classify`` for the score of a sequence classifier with one label.

    vLLM's activation (a sigmoid for one label) is asked to stay off, so that scores are logits. A key, where the
    server wants one, comes from ``REWARD_API_KEY`` (and ``REWARD_API_HOST`` names the server).

    Args:
        model: The model's name on the server; for ``classify`` also where its chat template is found.
        base_url: The server, without a path.
        endpoint: ``pooling`` renders the conversation on the server; ``classify`` takes it rendered here.
    """

    models_path = "/v1/models"

    def __init__(
        self,
        model: str,
        base_url: str = "http://127.0.0.1:8000",
        endpoint: Literal["pooling", "classify"] = "pooling",
        **options: Any,
    ) -> None:
        super().__init__(model, base_url, **options)
        self.endpoint = endpoint

    @cached_property
    @override
    def identity(self) -> list[Any]:
        return [*super().identity, self.endpoint]

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.model, option="the reward's model")

    @override
    def request(self, messages: Sequence[Message]) -> tuple[str, dict[str, Any]]:
        # The option was called softmax, then activation, before it was use_activation; a server ignores what it
        # does not know.
        raw = {"use_activation": False, "activation": False, "softmax": False}
        if self.endpoint == "pooling":
            turns = [{**message, "content": CONTROL.sub("", message["content"])} for message in messages]
            return "/pooling", {"model": self.model, "messages": turns, **raw}
        messages = without_special_tokens(self._tokenizer, messages)
        text = render(self._tokenizer, messages, add_generation_prompt=False)
        return "/classify", {"model": self.model, "input": [text], "add_special_tokens": False, **raw}

    @override
    def parse(self, reply: Any) -> float:
        (result,) = reply["data"]
        return last_number(result["data"] if self.endpoint == "pooling" else result["probs"])


def last_number(values: Any) -> float:
    """The score in a pooled output: a number, a list of one, or for a model that scores every token the last one's.

    Raises:
        ValueError: If the last token has several numbers.
    """
    while isinstance(values, list):
        if len(values) > 1 and not isinstance(values[0], list):
            raise ValueError("several numbers where one score was expected")
        values = values[-1]
    return float(values)
