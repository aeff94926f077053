"""``inspect``: rows as the model meets them, what is learned of each, how long they are and which are dropped."""

import sys
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.text import Text

from commands import options
from commands.configured import configured
from commands.inspection.examine import Examined, Piece, chosen_splits, examine
from core.errors import ConfigurationError
from core.files import check_writable, write_whole
from core.text import shown

STYLES = {"given": "dim", "learned": "bold green", "chosen": "bold green", "rejected": "red"}
MARKS = {"given": ("", ""), "learned": ("{+", "+}"), "chosen": ("{+", "+}"), "rejected": ("[-", "-]")}
"""What stands around a piece where there are no colours, as in a word diff."""
MARK = "<title>Rows as the model meets them"


def run() -> None:
    """Parse the command line and show."""
    own, rest = options.inspect().parse_known_args(sys.argv[1:])
    for name in ("rows", "examined"):
        if getattr(own, name) < 1:
            raise ConfigurationError(f"--{name} must be at least 1, got {getattr(own, name)}")
    if own.output is not None:
        check_page(own.output)
    data = configured(rest, command="validate").data()
    data.max_samples = min(own.examined, data.max_samples or own.examined)
    splits = [
        examine(part, split, examples=own.rows, title=title) for title, part, split in chosen_splits(data, own.split)
    ]
    if own.output is None:
        for found in splits:
            show(Console(), found, ids=own.ids)
        return
    write_whole(own.output, page(splits, ids=own.ids))
    print(f"page: {shown(str(own.output))}")


def check_page(output: Path) -> None:
    """Raise a ConfigurationError where the page cannot be written, or would replace a file of other kind."""
    check_writable(output.parent, option="--output")
    if output.is_dir() or (output.exists() and MARK not in output.read_text("utf-8", "replace")[:2_000]):
        raise ConfigurationError(f"{output} is no page of inspect, so it is not replaced; change --output")


def show(console: Console, found: Examined, *, ids: bool) -> None:
    """Print a split."""

    def line(text: str | Text, style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    console.rule(Text(shown(found.title)), align="left")
    line(f"{found.usable}; {found.summary}")
    for number, parts in found.examples:
        line(f"\nrow {number}", "bold")
        line(coloured(parts, colours=console.is_terminal))
        for part in parts if ids else ():
            line(f"{part.kind}: {part.ids}", "dim")
    line("\ntokens a row", "bold")
    most = max((bar.rows for bar in found.lengths), default=0)
    for bar in found.lengths:
        line(f"{bar.low:>6}-{bar.high:<6} {'█' * round(40 * bar.rows / most):40} {bar.rows:,}")
    for dropped in found.dropped:
        line(f"\ndropped: {dropped.rows:,} {shown(dropped.reason)}", "bold")
        if dropped.example:
            line(f"row {dropped.number}: {dropped.example}", "dim")
    line("")


def coloured(parts: list[Piece], *, colours: bool) -> Text:
    """The pieces in colours, or with marks around what is learned."""
    text = Text()
    for part in parts:
        before, after = ("", "") if colours else MARKS[part.kind]
        break_ = "\n" if part.kind == "rejected" else ""
        text.append(f"{break_}{before}{shown(part.text)}{after}", style=STYLES[part.kind])
    return text


def page(splits: list[Examined], *, ids: bool) -> str:
    """The splits as a page that stands alone; all text of the data is escaped."""
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader([folder / "inspection", folder / "comparison"]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template("inspect.html.jinja").render(splits=splits, ids=ids)
