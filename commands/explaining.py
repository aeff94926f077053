"""From jsonargparse's account of a wrong option to a few lines that a user can act on."""

import ast
import difflib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator

from core.imports import shadowed

MAX_LINES = 5
MAX_WIDTH = 400
PLAIN = {
    "NoneType": "null",
    "str": "text",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "Iterable": "a list",
}
UNKNOWN = (
    re.compile(r"unrecognized arguments: (?P<name>\S+)"),
    re.compile(r"Option '(?P<name>[^']+)' is not accepted"),
    re.compile(r"(?:Key|key) '(?P<name>[^']+)' is not expected"),
    re.compile(r"No action for key ['\"](?P<name>[^'\"]+)"),
)
OF_ARGPARSE = re.compile(r"argument (?P<name>\S+): invalid (?P<kind>\w+) value: '(?P<value>.*)'")


def explain(message: str, options: Iterable[str]) -> str:
    """The error in a line or two, with the nearest name where something is misspelt.

    Args:
        message: What jsonargparse says.
        options: The names of all options that the parser knows, dots included.
    """
    for pattern in UNKNOWN:
        if found := pattern.search(message):
            return unknown(found["name"], [*options, *parameters_in(message)])
    if "arguments are required" in message:
        hint = "; name a config (--config configs/sft.yaml)" if "model" in message else ""
        return " ".join(message.split()) + hint
    if found := OF_ARGPARSE.search(message):
        return f"{found['name']} must be {PLAIN.get(found['kind'], found['kind'])}, got {found['value']}"
    denied = re.search(r"[Ii]mport(?:ing| path) '([\w.]+)' is not allowed", message)
    if denied:
        return shadowed(denied[1]) or (
            f"{denied[1]} is nothing that a config may name: only what this suite has, building blocks of Lightning "
            "and torch, and modules or packages (with __init__.py) of the current directory"
        )
    keys = re.findall(r"Parser key \"([^\"]+)\"", message)
    values = re.findall(r"(?:Given value|Got value): (.+)", message)
    kinds = list(dict.fromkeys(wanted(message)))
    if keys and values and kinds:
        classes = list(class_names(message))
        near = did_you_mean(values[-1].rpartition(".")[2], [*literals(message), *classes])
        return f"{keys[-1]} must be {' or '.join(kinds)}, got {values[-1]}{near}"
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    return "\n".join(line[:MAX_WIDTH] for line in lines[:MAX_LINES])


def unknown(argument: str, options: Iterable[str]) -> str:
    """What to say of an option that does not exist."""
    name = argument.lstrip("-").partition("=")[0]
    known = sorted(option for option in options if option != "help")
    whole = [option for option in known if "." not in option or option.partition(".")[0] not in known]
    if not argument.startswith("-") and "." not in name and not any("." in option for option in whole):
        few = f"; there are: {', '.join(whole)}" if len(whole) <= 20 else ""
        return f"there is no option {name!r}{did_you_mean(name, known) or few}"
    near = did_you_mean(name, known) or did_you_mean(name, [option.rpartition(".")[2] for option in known])
    return f"there is no option {argument.partition('=')[0]!r}{near}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that names the nearest known name, empty where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.65)
    return f"; did you mean {near[0]}?" if near else ""


def wanted(message: str) -> Iterator[str]:
    """What a value may be, in words."""
    for kind in re.findall(r"Expected an? (<class '[^']+'>|typing\.Literal\[.+?\])", message):
        if kind.startswith("typing"):
            yield f"one of {', '.join(kind[len('typing.Literal[') : -1].split(', '))}"
        else:
            name = kind[len("<class '") : -2].rpartition(".")[2]
            yield PLAIN.get(name, f"a {name}")
    yield from (f"a {name.rpartition('.')[2]}" for name in bases(message))


def literals(message: str) -> list[str]:
    """Every value that the message lists as possible."""
    groups = re.findall(r"Literal\[(.+?)\]", message)
    return [str(value) for group in groups for value in ast.literal_eval(f"[{group}]")]


def bases(message: str) -> list[str]:
    """The classes a value may be an instance of, without Python's own."""
    line = re.search(r"Subtypes: \[(.+)\]", message)
    found = re.findall(r"[\w.]+\.[A-Z]\w+", line[1]) if line else []
    return [name for name in found if not name.startswith(("typing.", "collections."))]


def class_names(message: str) -> Iterator[str]:
    """The classes that could have been meant, as far as they are imported."""
    for path in bases(message):
        module, _, name = path.rpartition(".")
        pending = [getattr(sys.modules.get(module), name, object)]
        while pending and pending != [object]:
            cls = pending.pop()
            yield cls.__name__
            pending += cls.__subclasses__()


def parameters_in(message: str) -> list[str]:
    """The options of the class that a message is about."""
    named = re.search(r"class_path '([\w.]+)'", message)
    if named is None:
        return []
    module, _, name = named[1].rpartition(".")
    cls = getattr(sys.modules.get(module), name, None)
    return [
        p for base in getattr(cls, "__mro__", ()) for p in inspect.signature(base.__init__).parameters if p != "self"
    ]
