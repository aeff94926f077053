"""What the parsers of the commands share: what a config may name, keys refused, and errors of a few lines."""

import re
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from commands.explaining import did_you_mean, explain
from commands.first_look import SOURCES, place
from core.errors import ConfigurationError
from core.imports import allowed_packages
from core.plain import DEEPEST, loaded_file, loaded_yaml
from core.secrets import redact, secret_in
from core.terminal import say_error


class Parser(ArgumentParser):
    """jsonargparse's, with short errors."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong in a few lines, without the usage of five hundred options, and end with exit code 2."""
        parsers: list[Any] = [self]
        if self._subcommands_action is not None:
            parsers += self._subcommands_action._name_parser_map.values()
        options = {action.dest for known in parsers for action in known._actions}
        if found := re.search(r"arguments are required: ([\w, ]+)$", message):  # of a class, which knows no section
            names = [name if name in SOURCES else place(name) or name for name in found[1].split(", ")]
            message = f"{message[: found.start(1)]}{', '.join(names)}"
        say_error(explain(message, options))
        raise SystemExit(2)


class ConfigParser(Parser, LightningArgumentParser):
    """Lightning's, with the same."""


def restrict() -> None:
    """Let a config name our own, the listed and the user's own code, and nothing that is fetched from a network."""
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=allowed_packages(),
        instantiate_subclass_spec_in_any=False,
        config_read_mode_urls_enabled=False,
        config_read_mode_fsspec_enabled=False,
    )


def check_arguments(arguments: list[str]) -> None:
    """Refuse what must not reach the parser: keys, configs from a network, files that are no configs, two methods.

    Raises:
        ConfigurationError: Naming the option or the file, never a key's text.
    """
    methods: dict[str, str] = {}
    for name, value in named_values(arguments):
        refuse_secrets({name: loaded_yaml(value)})
        is_config = name in ("config", "c")
        if is_config or (may_be_config(name.rpartition(".")[2], value) and Path(value).is_file()):
            content = read_config(value)
            refuse_secrets(content, f"{value}: ")
            check_named(content, Path(value).parent)
            model = content.get("model")
            if is_config and isinstance(model, dict) and "class_path" in model:
                methods[value] = str(model["class_path"]).rpartition(".")[2]
    if len(set(methods.values())) > 1:
        told = ", ".join(f"{file} is of {method}" for file, method in methods.items())
        raise ConfigurationError(f"the configs contradict each other: {told}; name the config of one method")


def check_named(content: Any, folder: Path, depth: int = 0) -> None:
    """Check the configs that a config names in the place of a section, as the parser reads these too."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, value in pairs:
        if isinstance(value, (dict, list)):
            check_named(value, folder, depth)
        elif may_be_config(name, value):
            for file in (folder / value, Path(value)):
                if file.is_file() and depth < DEEPEST:
                    inner = loaded_file(file)
                    refuse_secrets(inner, f"{file}: ")
                    check_named(inner, file.parent, depth + 1)


def may_be_config(name: Any, value: Any) -> bool:
    """Whether an option's value can be the name of a file of options, and not of one of rows."""
    return name != "dataset_name" and isinstance(value, str) and value.endswith((".yaml", ".yml", ".json"))


def named_values(arguments: list[str]) -> list[tuple[str, str]]:
    """Option and value for each argument that has one: ``--a.b value``, ``--a.b=value`` and ``-c value``."""
    pairs = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if argument.startswith("-"):
            name, equals, value = argument.lstrip("-").partition("=")
            pairs.append((name, value if equals or following.startswith("--") else following))
        elif not pairs or pairs[-1][1] != argument:
            pairs.append(("", argument))
    return pairs


def read_config(path: str) -> dict[str, Any]:
    """A config's content.

    Raises:
        ConfigurationError: If there is no such file, or it is no YAML of plain values.
    """
    if "://" in path:
        raise ConfigurationError(f"--config {redact(path)} is a URL; configs are read from disk alone: download it")
    file = Path(path)
    if not file.is_file():
        beside = sorted(str(other) for other in file.parent.glob("*.yaml")) if file.parent.is_dir() else []
        near = did_you_mean(path, beside)
        raise ConfigurationError(f"--config {path} {'is no file' if file.exists() else 'does not exist'}{near}")
    content = loaded_file(file)
    if not isinstance(content, dict):
        raise ConfigurationError(f"--config {path} holds no options but {type(content).__name__}")
    for section, options in content.items():
        if isinstance(options, list):
            raise ConfigurationError(f"--config {path}: {section} must hold options, got a list")
    return content


def refuse_secrets(options: Any, where: str = "") -> None:
    """Raise a ConfigurationError where nested options hold a key, without repeating it."""
    found = secret_in(options)
    if found:
        raise ConfigurationError(
            f"{where}{found}; keys come from the environment alone (NVIDIA_API_KEY, WANDB_API_KEY, HF_TOKEN), "
            "as options are written into config.yaml, checkpoints and W&B"
        )
