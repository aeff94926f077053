"""Ranks of a run as processes forked from one that has imported everything, so that a start costs no imports."""

import faulthandler
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from tqdm.std import TqdmDefaultWriteLock

FORK = multiprocessing.get_context("fork")
TqdmDefaultWriteLock.mp_lock = None
"""All forked processes share this lock of all bars: one that is killed while it draws would keep it from the rest."""
LIMIT_S = 120.0
"""No process takes as long. One that does hangs: it is ended, and says in its log where it was."""


def start(function: Callable[[], int], *, ranks: int, log: Path) -> list[Any]:
    """A process for each rank, in the environment that a launcher gives it, and in a process group of its own.

    Args:
        function: What each of them runs; returns the exit code.
        ranks: How many.
        log: Where their output is appended.
    """
    port = free_port()
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
    processes = []
    for rank in range(ranks):
        environment = {**launched, "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        processes.append(FORK.Process(target=_process, args=(function, log, environment)))
        processes[-1].start()
    return processes


def ended(processes: Sequence[Any]) -> list[int]:
    """Wait for all of the processes and return their exit codes."""
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def _process(function: Callable[[], int], log: Path, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ |= {"WANDB_MODE": "disabled", "HF_DATASETS_CACHE": str(log.parent / "datasets"), **environment}
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", 0))  # type: ignore[attr-defined]  # as an import finds it
    faulthandler.dump_traceback_later(LIMIT_S, exit=True, file=2)
    torch.set_num_threads(1)
    sys.argv = ["cli.py"]
    sys.exit(function())
