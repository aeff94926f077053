"""Runs whose processes do not fit together: whether all of them end in time, and with the line that says why.

python -m tests.launches
python -m tests.launches --cases other-port missing
"""

import argparse
import os
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from lightning.pytorch.utilities import rank_zero_only

from cli import main as cli_main
from tests.forked import FORK, free_port
from tests.kills import command, make_material

LIMIT_S = 60.0
PATIENCE_S = 6.0
Variables = Mapping[str, Any]


class Process(NamedTuple):
    """One of the processes of a run."""

    variables: Variables
    """What its launcher sets; PORT stands for a free one."""
    options: Sequence[str] = ()
    patches: Mapping[str, Any] = {}
    """What is another for it, by import path."""


class Case(NamedTuple):
    """A launch that is wrong."""

    processes: Sequence[Process]
    told: str | tuple[str, ...]
    """What every process says; or what each does."""
    any_order: bool = False
    """Whether any of them may be the one that says a line."""


def of_lightning(node: int, **more: Any) -> Variables:
    """What a user sets on each machine who starts one process on it."""
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "PORT", "NODE_RANK": node, "LOCAL_RANK": 0, **more}


def of_torchrun(rank: int, world: int = 2, **more: Any) -> Variables:
    """What torchrun sets."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "1"}
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "PORT", **ranks, **more}


def of_srun(rank: int, tasks: int = 2, **more: Any) -> Variables:
    """What srun sets for a job of one task on each machine."""
    ranks = {"SLURM_PROCID": rank, "SLURM_NODEID": rank, "SLURM_LOCALID": 0, "SLURM_STEP_ID": 0}
    job = {"SLURM_JOB_ID": 4242, "SLURM_JOB_NAME": "train", "SLURM_NTASKS": tasks, "SLURM_NTASKS_PER_NODE": 1}
    place = {"SLURM_NNODES": tasks, "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": "PORT"}
    return {**job, **ranks, **place, **more}


TWO = ("--trainer.num_nodes", "2", "--trainer.devices", "1")
THREE = ("--trainer.num_nodes", "3", "--trainer.devices", "1")


def versions(changed: str, value: str) -> Any:
    """``importlib.metadata.version`` with another version of a package."""
    return lambda name: value if name == changed else version(name)


def two(*, first: Sequence[str] = TWO, second: Sequence[str] = TWO, **more: Any) -> list[Process]:
    """A process on each of two machines."""
    return [Process(of_lightning(0), first), Process(of_lightning(1), second, **more)]


CASES: Mapping[str, Case] = {
    "other-option": Case(
        two(second=(*TWO, "--model.learning_rate", "0.25")),
        "process 1 on HOST was started with model.learning_rate 0.25, process 0 on HOST with 0.01; give all the same",
    ),
    "other-version": Case(
        two(patches={"commands.launch.version": versions("transformers", "9.9")}),
        "process 1 on HOST has transformers 9.9, process 0 on HOST ",
    ),
    "other-code": Case(
        two(patches={"commands.launch.code_digest": lambda: "another"}),
        "process 1 on HOST runs other code of this suite than process 0 on HOST; check out the same",
    ),
    "other-rows": Case(
        two(patches={"datamodules.base.rows_digest": lambda rows: "others"}),
        "the rows of train_prefs are others for process 1 on HOST than for process 0 on HOST; give all machines the",
    ),
    "other-number-of-nodes": Case(
        two(second=THREE),
        "process 1 on HOST takes the run to have 3 processes, process 0 on HOST 2; set trainer.devices and",
    ),
    "missing": Case(
        [Process(of_lightning(node), THREE) for node in (0, 2)],
        "process 1 of 3 did not come within 6 s, where 0, 2 on HOST did; start it, or lower trainer.devices or",
    ),
    "first-missing": Case(
        [Process(of_lightning(1), TWO)],
        "process 1 on HOST did not reach process 0 at 127.0.0.1:PORT within 6 s; start one there, and set MASTER_ADDR",
    ),
    "both-first": Case(
        [Process(of_lightning(0), TWO), Process(of_lightning(0), (*TWO, "--trainer.default_root_dir", "OWN"))],
        ("process 1 of 2 did not come within 6 s", "another process that takes itself for the first (NODE_RANK)"),
        any_order=True,  # one of them has the port first
    ),
    "same-number": Case(
        [Process(of_lightning(0), THREE), Process(of_lightning(1), THREE), Process(of_lightning(1), THREE)],
        "2 processes take themselves for number 1, on HOST; give each machine a NODE_RANK",
    ),
    "other-port": Case(
        [Process(of_lightning(0), TWO), Process(of_lightning(1, MASTER_PORT="OTHER"), TWO)],
        ("process 1 of 2 did not come within 6 s", "process 1 on HOST did not reach process 0 at 127.0.0.1:OTHER"),
    ),
    "port-taken": Case(
        [Process(of_lightning(0, MASTER_PORT="TAKEN"), TWO)],
        "process 0 cannot listen on port TAKEN: another run on HOST has it, or another process that takes itself for",
    ),
    "torchrun-devices": Case(
        [Process(of_torchrun(rank), ("--trainer.devices", "3")) for rank in (0, 1)],
        "does not match the world size (2)",
    ),
    "torchrun-nodes": Case(
        [Process(of_torchrun(rank), ("--trainer.devices", "2", "--trainer.num_nodes", "2")) for rank in (0, 1)],
        "does not match the world size (2)",
    ),
    "slurm-tasks-per-node": Case(
        [Process(of_srun(rank, SLURM_NTASKS_PER_NODE=2), TWO) for rank in (0, 1)],
        "`--ntasks-per-node=2` does not match",
    ),
    "slurm-nodes": Case(
        [Process(of_srun(rank), ("--trainer.devices", "1", "--trainer.num_nodes", "1")) for rank in (0, 1)],
        "SLURM runs 2 tasks, and trainer.devices 1 x trainer.num_nodes 1 are 1; one task a device: set --nodes 1",
    ),
    "slurm-ntasks-alone": Case(
        [Process(of_srun(rank, SLURM_NTASKS_PER_NODE=None), TWO) for rank in (0, 1)],
        "Use `--ntasks-per-node=2` instead",
    ),
    "slurm-tasks": Case(
        [Process(of_srun(rank, tasks=3, SLURM_NNODES=2), TWO) for rank in (0, 1, 2)],
        "SLURM runs 3 tasks, and trainer.devices 1 x trainer.num_nodes 2 are 2; one task a device",
    ),
    "slurm-without-srun": Case(
        [Process(of_srun(0, SLURM_STEP_ID=None), TWO)],
        "SLURM has 2 tasks for this job, and this process is none of them; start it by srun",
    ),
}


class Outcome(NamedTuple):
    """How a launch ended."""

    seconds: float
    codes: list[Any]
    told: list[bool]
    """Of each process, whether it has said what is wrong."""
    printed: list[str]


def trial(directory: Path, name: str) -> Outcome:
    """Start the processes of a case, and wait for their end."""
    case = CASES[name]
    folder = directory / name
    folder.mkdir()
    with socket.create_server(("", 0)) as taken:
        ports = {"PORT": free_port(), "OTHER": free_port(), "TAKEN": taken.getsockname()[1]}
        names = {**{short: str(port) for short, port in ports.items()}, "HOST": socket.gethostname()}
        names["OWN"] = str(folder / "own")
        arguments = command(directory / "material", folder / "run", "DPOModule", ranks=2)
        arguments = [*arguments[:3], "--launch_timeout_s", str(PATIENCE_S)]
        logs = [folder / f"{number}.txt" for number in range(len(case.processes))]
        started = [
            FORK.Process(target=run, args=(process, [*arguments, *with_names(process.options, names)], names, log))
            for process, log in zip(case.processes, logs, strict=True)
        ]
        began = time.monotonic()
        for child in started:
            child.start()
        for child in started:
            child.join(max(0.0, LIMIT_S - (time.monotonic() - began)))
    seconds = time.monotonic() - began
    codes = [child.exitcode for child in started]
    for child in started:
        child.kill()
    lines = with_names((case.told,) * len(started) if isinstance(case.told, str) else case.told, names)
    printed = [log.read_text() for log in logs]
    told = [
        [line in text and "Traceback" not in text for line, text in zip(order, printed, strict=True)]
        for order in (permutations(lines) if case.any_order else [lines])
    ]
    return Outcome(seconds, codes, max(told, key=sum), printed)


def run(process: Process, arguments: Sequence[str], names: Mapping[str, str], log: Path) -> None:
    """What each process does."""
    os.setsid()
    given = {name: str(value) for name, value in process.variables.items() if value is not None}
    variables = dict(zip(given, with_names(list(given.values()), names), strict=True))
    os.environ |= {"WANDB_MODE": "disabled", "HF_DATASETS_CACHE": str(log.parent / "datasets"), **variables}
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    ranks = (variables.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    rank_zero_only.rank = int(next(filter(None, ranks)))  # type: ignore[arg-type, attr-defined]  # as an import finds it
    torch.set_num_threads(1)
    sys.argv = ["cli.py"]
    with ExitStack() as patched:
        for place, other in process.patches.items():
            patched.enter_context(mock.patch(place, other))
        sys.exit(cli_main(list(arguments)))


def with_names(texts: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """The texts with ports, hosts and folders for what stands for them."""
    found = []
    for text in texts:
        for short, value in names.items():
            text = text.replace(short, value)
        found.append(text)
    return found


def main() -> int:
    """Launch in every wrong way, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bad = False
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        make_material(directory / "material")
        print(f"{'case':22} {'seconds':>8} {'codes':14} told")
        for name in options.cases:
            found = trial(directory, name)
            print(f"{name:22} {found.seconds:8.1f} {found.codes!s:14} {found.told}", flush=True)
            if not all(found.told) or not all(found.codes) or found.seconds > 2 * PATIENCE_S:
                bad = True
                print("\n".join(text[-1500:] for text in found.printed))
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
