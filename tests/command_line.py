"""Commands run within the process of the tests."""

from collections.abc import Callable
from typing import NamedTuple


class Result(NamedTuple):
    """What a command left."""

    returncode: int
    stdout: str
    stderr: str


Cli = Callable[..., Result]


def assert_refused(result: Result, message: str) -> None:
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    errors = result.stderr[result.stderr.index("error: ") :].strip().splitlines()
    assert len(errors) <= 8
    assert "Traceback" not in result.stderr
