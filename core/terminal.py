"""What a person reads in a terminal, which breaks lines in the middle of words, and what a file gets as it is."""

import shutil
import sys
import textwrap

from core.secrets import redact
from core.text import shown


def fitted(text: str, *, is_terminal: bool) -> str:
    """The text as it is; for a terminal with its lines broken between words, and what goes on indented.

    Paths and other words without spaces stay whole.
    """
    if not is_terminal:
        return text
    width = shutil.get_terminal_size().columns
    return "\n".join(_broken(line, width) if len(line) > width else line for line in text.split("\n"))


def say_error(message: str) -> None:
    """Print an error for whoever can mend it, without keys, and without what a terminal would act on."""
    print(fitted(f"error: {shown(redact(message))}", is_terminal=sys.stderr.isatty()), file=sys.stderr)


def _broken(line: str, width: int) -> str:
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)
