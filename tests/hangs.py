"""Runs on several ranks of which one fails: how long the others take to end, and whether the reason is told.

python -m tests.hangs
python -m tests.hangs --cases reward-raises killed-in-a-step [--sharded]

No launcher ends the other ranks here, as one would.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from cli import main as cli_main
from tests.forked import start
from tests.kills import command, make_material

LIMIT_S = 60.0
"""How long a run whose rank has failed may take to end."""
BROKEN = "this rank is broken"


class Case(NamedTuple):
    """One way to fail."""

    method: str
    place: str
    """The import path of what fails."""
    call: int = 3
    """At which call of it."""
    kills: bool = False
    sleeps_s: float = 0.0
    """How long it takes at that call, in the place of failing, with half as much time for the ranks' group."""


CASES: Mapping[str, Case] = {
    "reward-raises": Case("RLOOModule", "lightning_modules.rloo.score_samples"),
    "sampling-raises": Case("RLOOModule", "lightning_modules.rloo.sample_completions"),
    "step-raises": Case("SFTModule", "lightning_modules.sft.completion_losses"),
    "validation-raises": Case("SFTModule", "lightning_modules.sft.completion_tokens"),
    "evaluation-raises": Case("SFTModule", "callbacks.evaluation.evaluate.score_share", call=1),
    "completing-raises": Case("SFTModule", "callbacks.evaluation.completions.sample_completions", call=1),
    "loading-raises": Case("DPOModule", "lightning_modules.dpo.weights_digest", call=1),
    "killed-in-a-step": Case("SFTModule", "lightning_modules.sft.completion_losses", kills=True),
    "killed-in-sampling": Case("RLOOModule", "lightning_modules.rloo.sample_completions", kills=True),
    "slow-reward": Case("RLOOModule", "lightning_modules.rloo.score_samples", sleeps_s=6.0),
}


class Outcome(NamedTuple):
    """How a run ended."""

    seconds: float
    """From the failure to the end of the last rank; infinite where one was still there."""
    told: bool
    """Whether the reason is in what was printed."""
    right: bool
    """Whether every rank ended as it should: well where one was slow, else not."""
    codes: list[Any]


def fail(case: Case, *, rank: int, failed_at: Path) -> Callable[..., Any]:
    """What stands in for a function: on one rank it fails at one of its calls."""
    module, _, name = case.place.rpartition(".")
    original = getattr(sys.modules[module], name)
    calls = 0

    def failing(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= case.call and int(os.environ.get("LOCAL_RANK", "0")) == rank:
            if case.sleeps_s and failed_at.exists():
                return original(*args, **options)
            failed_at.touch()
            if case.sleeps_s:
                time.sleep(case.sleeps_s)
                return original(*args, **options)
            if case.kills:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError(BROKEN)
        return original(*args, **options)

    return failing


def trial(directory: Path, name: str, *, rank: int, ranks: int, sharded: bool) -> Outcome:
    """A run whose rank fails."""
    case = CASES[name]
    folder = directory / f"{name}-{rank}"
    folder.mkdir()
    arguments = command(directory / "material", folder / "run", case.method, ranks=ranks, sharded=sharded)
    failed_at = folder / "failed"

    def broken_run() -> int:
        function = fail(case, rank=rank, failed_at=failed_at)
        patience = {"timeout": timedelta(seconds=case.sleeps_s / 2)} if case.sleeps_s else {}
        original = dist.init_process_group

        def connect(*args: Any, **options: Any) -> None:
            original(*args, **{**options, **patience})

        with mock.patch(case.place, function), mock.patch("torch.distributed.init_process_group", connect):
            return cli_main(arguments)

    processes = start(broken_run, ranks=ranks, log=folder / "log.txt")
    while not failed_at.exists() and any(process.exitcode is None for process in processes):
        time.sleep(0.05)
    began = time.monotonic()
    for process in processes:
        process.join(max(0.0, LIMIT_S - (time.monotonic() - began)))
    seconds = time.monotonic() - began
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            seconds = float("inf")
    log = (folder / "log.txt").read_text()
    told = failed_at.exists() and (case.kills or case.sleeps_s > 0 or BROKEN in log)
    ended = all(code == 0 for code in codes) if case.sleeps_s else all(codes)
    return Outcome(seconds, told, ended, codes)


def main() -> int:
    """Fail in every way on the first rank and on the last, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sharded", action="store_true", help="have the ranks share the weights too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bad = False
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        make_material(directory / "material")
        print(f"{'case':20} {'rank':>4} {'seconds':>8} {'told':>5} exit codes")
        for name in options.cases:
            for rank in (0, options.ranks - 1):
                found = trial(directory, name, rank=rank, ranks=options.ranks, sharded=options.sharded)
                print(f"{name:20} {rank:4} {found.seconds:8.1f} {found.told!s:>5} {found.codes}", flush=True)
                bad = bad or not found.told or not found.right or found.seconds > LIMIT_S
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
