"""NVIDIA's Nemotron reward models over HTTP: the hosted API, a NIM, or any server that speaks their protocol."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from typing_extensions import override

from datamodules.messages import Message
from lightning_modules.rewards.http import HTTPReward

HOSTED_URL = "https://integrate.api.nvidia.com/v1"
ATTRIBUTE_WEIGHTS = {"helpfulness": 0.3, "correctness": 0.74, "coherence": 0.46, "complexity": 0.47, "verbosity": -0.33}
"""How the 340B model's five attributes make one score (its model card)."""


class NemotronReward(HTTPReward):
    """Asks a Nemotron reward model for the quality of the last assistant turn; a reply without a score is NaN.

    NVIDIA's hosts get ``NVIDIA_API_KEY``, a server of one's own ``REWARD_API_KEY`` where ``REWARD_API_HOST`` names it.

    Args:
        model: The model's name on the server.
        base_url: The API up to and without ``/chat/completions``.
        requests_per_minute: NVIDIA's trial tier allows about 40; shared by every process of this user on this
            machine. 0 for no limit.
    """

    models_path = "/models"

    def __init__(
        self,
        model: str = "nvidia/llama-3.1-nemotron-70b-reward",
        base_url: str = HOSTED_URL,
        requests_per_minute: int = 40,
        **options: Any,
    ) -> None:
        super().__init__(model, base_url, requests_per_minute, **options)

    @override
    def request(self, messages: Sequence[Message]) -> tuple[str, dict[str, Any]]:
        hosted = self.base_url == HOSTED_URL  # a server of one's own reads a system turn as the model itself does
        turns = folded_system(messages) if hosted else list(messages)
        return "/chat/completions", {"model": self.model, "messages": turns}

    @override
    def parse(self, reply: Any) -> float:
        return parse_score(reply)

    @cached_property
    @override
    def identity(self) -> list[Any]:
        """As every source's, and that a server of one's own is sent system turns, as scores may be kept without."""
        return super().identity if self.base_url == HOSTED_URL else [*super().identity, "system turns"]

    @override
    def _served(self) -> list[Any]:
        return [] if self.base_url == HOSTED_URL else super()._served()

    @override
    def without_key(self) -> str:
        if self.base_url != HOSTED_URL:
            return ""
        return (
            "NVIDIA_API_KEY is not set: export it, or name another source in evaluation.reward, "
            "or switch the evaluation off with --evaluation.num_prompts 0"
        )


def folded_system(prompt: Sequence[Message]) -> list[Message]:
    """The prompt with a system turn put before the first user turn's text: the API documents no system role."""
    if not prompt or prompt[0]["role"] != "system":
        return list(prompt)
    if len(prompt) == 1 or prompt[1]["role"] != "user":
        return [{"role": "user", "content": prompt[0]["content"]}, *prompt[1:]]
    first = {"role": "user", "content": f"{prompt[0]['content']}\n\n{prompt[1]['content']}"}
    return [first, *prompt[2:]]


def parse_score(reply: Any) -> float:
    """The score in a reply, of the 70B model (``reward:-12.5``) or of the 340B model (five attributes).

    Raises:
        ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError: If there is no finite score in it.
    """
    choice = reply["choices"][0]
    message = choice["message"]
    content = (message[0] if isinstance(message, list) else message).get("content")
    if content:
        named = content if ":" in content else f"reward:{content}"
        values = dict(_named_number(part) for part in named.split(","))
    else:
        values = {token["token"]: float(token["logprob"]) for token in choice["logprobs"]["content"]}
    if set(values) == set(ATTRIBUTE_WEIGHTS):
        score = sum(ATTRIBUTE_WEIGHTS[name] * value for name, value in values.items())
    elif set(values) == {"reward"}:
        score = values["reward"]
    else:
        raise ValueError(f"unknown attributes {sorted(values)}")
    if not math.isfinite(score):
        raise ValueError("the score is not finite")
    return score


def _named_number(text: str) -> tuple[str, float]:
    name, _, number = text.partition(":")
    return name.strip(), float(number)
