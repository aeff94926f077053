"""``serve-reward``: a reward behind HTTP, under the protocol of NVIDIA's Nemotron API."""

from jsonargparse import auto_cli

from datamodules.errors import ConfigurationError
from lightning_modules.rewards import ModelReward, Reward


def run() -> None:
    """Parse the command line and serve."""
    auto_cli(serve_reward)


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
