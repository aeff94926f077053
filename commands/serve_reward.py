"""``serve-reward``: a reward behind HTTP, under the protocol of NVIDIA's Nemotron API."""

import sys
from typing import NoReturn

from jsonargparse import ArgumentParser, auto_cli
from typing_extensions import override

from commands.parsing import check_arguments, restrict, stop
from datamodules.errors import ConfigurationError
from lightning_modules.rewards import ModelReward, Reward


class Parser(ArgumentParser):
    """jsonargparse's, with short errors."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        stop(self, message)


def run() -> None:
    """Parse the command line and serve."""
    restrict()
    check_arguments(sys.argv[1:])
    auto_cli(serve_reward, parser_class=Parser)


def serve_reward(
    model: str | None = None, reward: Reward | None = None, host: str = "127.0.0.1", port: int = 8000
) -> None:
    """Serve a reward under the protocol of NVIDIA's Nemotron API, until interrupted.

    Args:
        model: Directory or hub id of a reward model.
        reward: Or the import path of another reward: a function or a class.
        host: Address to listen at; 0.0.0.0 for every one.
        port: Port to listen at.
    """
    try:
        from lightning_modules.rewards.server import serve
    except ImportError as error:
        raise ConfigurationError(f"serve-reward needs the serve extra ({error}): pip install '.[serve]'") from error
    if model is not None and reward is None:
        reward_model = ModelReward(model, option="--model")
        reward_model.load()
        serve(reward_model, host=host, port=port)
    elif reward is not None and model is None:
        serve(reward, host=host, port=port)
    else:
        raise ConfigurationError("serve-reward needs either --model DIR or --reward IMPORT.PATH")
