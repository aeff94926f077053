"""What the pages say of files, commands and options is there."""

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from commands.first_look import SOURCES, flaws, options_of

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def anchors(page: Path) -> set[str]:
    """The names that a page's headings can be linked by."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert file.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(file), target


def commands(page: Path) -> Iterator[list[str]]:
    """The command lines of ``fit`` and ``validate`` in a page's blocks and tables."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    for line in re.findall(r"(?:python |torchrun [^`\n]*?)cli\.py ((?:fit|validate) [^`|\n]+)", text):
        yield shlex.split(line.partition("  #")[0].replace("...", ""))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_have_options_and_configs_that_exist(page: Path) -> None:
    for command, *arguments in commands(page):
        if "--help-all" not in arguments:
            assert not list(flaws(command, arguments)), arguments
        for before, argument in itertools.pairwise(arguments):
            if before == "--config" and argument.startswith("configs/"):
                assert (ROOT / argument).is_file(), argument


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_options_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"`--([a-z_]+(?:\.[a-z_]+)+)", page.read_text("utf-8")):
        section, option, *_ = name.split(".")
        assert section in SOURCES, name
        assert option in options_of(section), name


def test_every_page_of_the_docs_is_in_their_contents() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]
    listed = [page for entry in nav for page in (entry.values() if isinstance(entry, dict) else [entry])]
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_the_first_page_stays_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").split()) <= 900
