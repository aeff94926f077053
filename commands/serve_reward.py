"""``serve-reward``: a reward behind HTTP, under the protocol of NVIDIA's Nemotron API."""

import socket
import sys

from commands import options
from commands.parsing import Parser, check_arguments, restrict
from core.errors import ConfigurationError
from lightning_modules.rewards import ModelReward, Reward, resolve_reward


def run() -> None:
    """Parse the command line and serve."""
    restrict()
    check_arguments(sys.argv[1:])
    own, of_reward = options.serve_reward().parse_known_args(sys.argv[1:])
    if own.reward is None and of_reward:
        raise ConfigurationError(f"{of_reward[0]!r} belongs to a reward, and none is named: name one in --reward")
    reward = None if own.reward is None else as_given(["--reward", own.reward, *of_reward])
    serve_reward(own.model, reward, host=own.host, port=own.port)


def as_given(arguments: list[str]) -> Reward | str:
    """What ``--reward`` names, with the options of its class."""
    parser = Parser()
    parser.add_argument("--reward", type=Reward | str)
    reward: Reward | str = parser.instantiate_classes(parser.parse_args(arguments)).reward
    return reward


def serve_reward(model: str | None, reward: Reward | str | None, *, host: str, port: int) -> None:
    """Serve the one that is given."""
    try:
        from lightning_modules.rewards.server import serve
    except ImportError as error:
        raise ConfigurationError(f"serve-reward needs the serve extra ({error}): pip install '.[serve]'") from error
    check_address(host, port)
    if model is not None and reward is None:
        reward_model = ModelReward(model, option="--model")
        reward_model.load()
        serve(reward_model, host=host, port=port)
    elif reward is not None and model is None:
        serve(resolve_reward(reward, option="--reward"), host=host, port=port)
    else:
        raise ConfigurationError("serve-reward needs either --model DIR or --reward IMPORT.PATH")


def check_address(host: str, port: int) -> None:
    """Raise a ConfigurationError where nothing can listen there, before a model is loaded."""
    if not 0 < port < 65536:
        raise ConfigurationError(f"--port must be within 1..65535, got {port}")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen at {host}:{port} ({error.strerror}); change --port or --host"
        ) from error
