"""A parser of a command's own few options, at hand before anything large is imported."""

import argparse
import sys
from typing import NoReturn

from typing_extensions import override

from core.secrets import redact
from core.text import shown

OF_A_CONFIG = "Every option of fit stands beside them: --config FILE, --data.max_length TOKENS, ..."


class Options(argparse.ArgumentParser):
    """argparse's, with errors of one line and no abbreviations."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})  # type: ignore[arg-type]

    @override
    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"error: {shown(redact(message))}\n")
        raise SystemExit(2)
