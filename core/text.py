"""Text of others, as far as it may reach a terminal or a page."""

import re

BEYOND = re.compile("[\ud800-\udfff]")
"""Halves of surrogate pairs, which no encoding takes."""


def printable(text: str) -> str:
    """The text on one line, with escapes for what a terminal would act on."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def shown(text: str) -> str:
    """The text with its lines, and otherwise as :func:`printable`."""
    return "\n".join(printable(line) for line in text.split("\n"))


def encodable(text: str) -> str:
    """The text with a question mark for what no file in UTF-8 can hold."""
    return BEYOND.sub("?", text)


def told(error: BaseException) -> str:
    """What somebody else's code raised, on a line."""
    kind = "" if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: "
    return printable(kind + " ".join(str(error).split()))[:300]
