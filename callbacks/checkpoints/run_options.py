"""The options of a run within its checkpoints, so that none is resumed as something else."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from core.errors import ConfigurationError

KEY = "run_options"
FREE = frozenset({"num_workers", "gradient_checkpointing", "compile", "requests_per_minute", "timeout_s"})
"""Options that change how fast a run is and not what it computes, by the last part of their name."""
TRAINER = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision")


class RunOptions(Callback):
    """Writes the options, as plain values by dotted name, into every checkpoint.

    Args:
        options: What :func:`run_options` returns.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = dict(options)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = self.options


def run_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The method, its options, the data's and those of the trainer that change what is computed, as plain values."""
    trainer = {name: config["trainer"].get(name) for name in TRAINER}
    parts = {"model": config["model"], "data": config.get("data"), "trainer": trainer}
    return flat({**parts, "seed_everything": config.get("seed_everything")})


def flat(options: Any, name: str = "") -> dict[str, Any]:
    """Nested options by dotted name, without the ``init_args`` between."""
    if isinstance(options, Mapping):
        named = ((key, f"{name}.{key}".lstrip(".") if key != "init_args" else name) for key in options)
        return {n: value for key, inner in named for n, value in flat(options[key], inner).items()}
    if isinstance(options, (list, tuple)):
        return {name: [flat(item) if isinstance(item, Mapping) else told_of(item) for item in options]}
    plain = options is None or isinstance(options, (str, int, float, bool))
    return {name: options if plain else told_of(options)}


def told_of(value: Any) -> str:
    """A value as the same text in every process: of a function or class its import path, as repr has an address."""
    name = getattr(value, "__qualname__", None)
    return f"{value.__module__}.{name}" if name else str(value)


def check_same_run(saved: Mapping[str, Any], asked: Mapping[str, Any], checkpoint: str) -> None:
    """Refuse to go on with other options than the checkpoint's run had.

    Raises:
        ConfigurationError: Naming the first option that differs, the method before all others, and both values.
    """
    for name in sorted(saved.keys() & asked.keys(), key=lambda option: (option != "model.class_path", option)):
        if name.rpartition(".")[2] not in FREE and saved[name] != asked[name]:
            raise ConfigurationError(
                f"{checkpoint} is of a run with {name} {saved[name]!r}, this one asks for {asked[name]!r}; "
                "change it back, or train anew without --ckpt_path and in another trainer.default_root_dir"
            )
