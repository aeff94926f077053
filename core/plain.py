"""Plain values from YAML, as far as anyone should have to read them."""

from pathlib import Path
from typing import Any

import yaml

from core.errors import ConfigurationError
from core.secrets import redact

LARGEST = 1_000_000
"""Bytes of a config."""
MOST = 10_000
"""Values of a config, aliases written out."""
DEEPEST = 40


def loaded_yaml(text: str) -> Any:
    """The text as YAML, as the parser will read it, or as it is.

    Raises:
        ConfigurationError: If it is more than any option holds.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    except RecursionError:
        raise too_much(f"an option ({text[:40]!r}...)") from None
    check_bounded(content, f"an option ({text[:40]!r}...)")
    return content


def check_bounded(content: Any, where: str) -> None:
    """Refuse values nested too deeply, within themselves, or whose aliases multiply: the parser would copy each."""
    sizes: dict[int, int] = {}

    def size(value: Any, depth: int) -> int:
        if depth > DEEPEST:
            raise too_much(where)
        if not isinstance(value, (dict, list, tuple)):
            return 1
        if id(value) not in sizes:
            inner = [*value, *value.values()] if isinstance(value, dict) else value
            sizes[id(value)] = 1 + sum(size(item, depth + 1) for item in inner)
        if sizes[id(value)] > MOST:
            raise too_much(where)
        return sizes[id(value)]

    size(content, 0)


def too_much(where: str) -> ConfigurationError:
    """What to say of values that no config holds."""
    return ConfigurationError(
        f"{where} holds more than {MOST:,} values, {DEEPEST} levels, or itself; no config of this suite does"
    )


def loaded_file(file: Path) -> Any:
    """A file's content as YAML.

    Raises:
        ConfigurationError: If it is no YAML of plain values, or more than any config holds.
    """
    try:
        if file.stat().st_size > LARGEST:
            raise ConfigurationError(f"{file} has more than {LARGEST:,} bytes; no config of this suite does")
        content = yaml.safe_load(file.read_text("utf-8"))
    except RecursionError:
        raise too_much(str(file)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} cannot be read ({error})") from error
    except yaml.YAMLError as error:
        told = redact(" ".join(str(error).split()))
        raise ConfigurationError(f"{file} is no YAML of plain values: {told[:300]}") from error
    check_bounded(content, str(file))
    return content
