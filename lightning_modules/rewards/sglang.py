"""A reward model behind SGLang, started with ``python -m sglang.launch_server --model-path MODEL --is-embedding``."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from datamodules.chat import load_tokenizer
from datamodules.chat_template import without_special_tokens
from datamodules.messages import Message
from datamodules.rendering import render
from lightning_modules.rewards.http import HTTPReward


class SGLangReward(HTTPReward):
    """Asks SGLang's ``/classify`` for the score of a sequence classifier with one label.

    The conversation is rendered here, with the template of ``model``. A key, where the server wants one, comes from
    ``REWARD_API_KEY`` (and ``REWARD_API_HOST`` names the server).

    Args:
        model: Hub id or directory of the model that is served.
        base_url: The server, without a path.
    """

    models_path = "/v1/models"

    def __init__(self, model: str, base_url: str = "http://127.0.0.1:30000", **options: Any) -> None:
        super().__init__(model, base_url, **options)

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.model, option="the reward's model")

    @cached_property
    def _added_bos(self) -> str:
        """The text of the token that the server's tokenizer puts before every text."""
        bos = self._tokenizer.bos_token_id
        return str(self._tokenizer.bos_token) if bos in self._tokenizer("")["input_ids"] else ""

    @override
    def request(self, messages: Sequence[Message]) -> tuple[str, dict[str, Any]]:
        text = render(self._tokenizer, without_special_tokens(self._tokenizer, messages), add_generation_prompt=False)
        return "/classify", {"model": self.model, "text": [text.removeprefix(self._added_bos)]}

    @override
    def parse(self, reply: Any) -> float:
        (result,) = reply if isinstance(reply, list) else [reply]
        (score,) = result["embedding"]
        return float(score)
