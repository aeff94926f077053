"""Launches that do not fit end with the line that says why, and those that do train on machines that share no disk."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from commands.members import Member, judge, ranges, told
from tests.forked import free_port
from tests.launches import CASES
from tests.nodes import rehearse, separate
from tests.test_preemption import logged_steps, wait_for
from tests.test_ranks import in_a_process_of_its_own

ROOT = Path(__file__).parents[1]

WAIT = ("missing", "first-missing", "both-first", "same-number", "other-port")
"""Cases in which somebody waits for somebody else until the time is over."""


def member(host: str = "node-a", **changes: Any) -> Member:
    found = Member(
        host, 4, "cuda H100 (GPU-1)", {"torch": "2.13.0", "lightning": "2.6.6", "transformers": "5.1"}, "c", {}, ""
    )
    return found._replace(**changes)


def four(**of_third: Any) -> dict[int, Member]:
    """Two processes on each of two hosts, the third with something else."""
    places = [("node-a", 0), ("node-a", 1), ("node-b", 0), ("node-b", 1)]
    found = {rank: member(host, device=f"cuda H100 (GPU-{gpu})") for rank, (host, gpu) in enumerate(places)}
    found[2] = found[2]._replace(**of_third)
    return found


def test_processes_that_fit_are_told_by_host() -> None:
    assert judge(four(), {}, 4, 60.0) == ""
    first, *hosts = told(four()).splitlines()
    assert first.startswith("4 processes with torch 2.13.0, lightning 2.6.6, transformers 5.1, config ")
    assert hosts == ["  node-a: 0-1 on cuda H100", "  node-b: 2-3 on cuda H100"]
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"device": "cuda H100 (GPU-1)"},
            "processes 2 and 3 have the same GPU, cuda H100 (GPU-1) of node-b;",
        ),
        (
            {"checkpoint": "last.ckpt of step 7"},
            "process 2 on node-b would go on from last.ckpt of step 7, process 0 on node-a from nothing; have the "
            "run's folder on a disk that all machines share, or copy its checkpoints to each",
        ),
        (
            {"versions": {"torch": "2.13.0"}},
            "process 2 on node-b has lightning None, process 0 on node-a 2.6.6;",
        ),
        (
            {"options": {"a.b": 1}},
            "process 2 on node-b was started with a.b 1, process 0 on node-a with None",
        ),
    ],
)
def test_what_does_not_fit_names_the_process_and_its_host(change: dict[str, Any], line: str) -> None:
    assert judge(four(**change), {}, 4, 60.0).startswith(line)


def test_who_has_not_come_is_told_before_what_they_might_have_been() -> None:
    found = four()
    del found[1], found[2]
    assert judge(found, {}, 4, 60.0).startswith(
        "processes 1-2 of 4 did not come within 60 s, where 0 on node-a, 3 on node-b did; start them, or lower"
    )


def test_a_launch_that_does_not_fit_ends_on_every_process_with_the_line_that_says_why() -> None:
    in_a_process_of_its_own("tests.launches", "--cases", *(name for name in CASES if name not in WAIT))


@pytest.mark.slow
def test_a_process_that_does_not_come_ends_the_others_in_time() -> None:
    in_a_process_of_its_own("tests.launches", "--cases", *WAIT)


@pytest.mark.slow
@pytest.mark.skipif(not separate(), reason="this machine lets nobody have a mount namespace of his own")
@pytest.mark.parametrize(
    ("launcher", "method", "sharded"), [("torchrun", "DPOModule", True), ("srun", "RLOOModule", False)]
)
def test_machines_that_share_no_disk_train_and_go_on(launcher: str, method: str, sharded: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        well, printed = rehearse(Path(folder), method, launcher, sharded=sharded)
        assert well, printed[-3000:]
        assert "4 processes with torch" in printed
        place = f"there is {folder}/{method}"
        lines = printed.splitlines()
        assert lines.count(f"{place}/run/checkpoints/last.ckpt") == 2, "each machine has what it goes on from"
        assert lines.count(f"{place}/run/final/model.safetensors") == 1
        assert lines.count(f"{place}/run/eval/epoch=2/metrics.json") == 1


SRUN = """#!/usr/bin/env bash
# srun's part of a job on one machine: a process a task, told by variables which one it is
while [[ $1 == --* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 SLURM_STEP_ID=0 "$@" &
done
code=0
for job in $(jobs -p); do wait "$job" || code=$?; done
exit $code
"""


@pytest.mark.slow
def test_a_job_whose_time_is_over_saves_has_itself_queued_again_and_goes_on(config: Any, tmp_path: Path) -> None:
    """By ``slurm.sbatch``, with stand-ins for ``srun`` and ``scontrol``."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, script in {"srun": SRUN, "scontrol": f'#!/bin/sh\necho "$@" >> {tmp_path}/queued\n'}.items():
        (commands / name).write_text(script)
        (commands / name).chmod(0o755)
    (commands / "python").symlink_to(sys.executable)
    job = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    job |= {"SLURM_NNODES": "1", "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": str(free_port())}
    job |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **job, "PATH": f"{commands}:{os.environ['PATH']}"}
    trainer = {"accelerator": "cpu", "max_epochs": 400, "log_every_n_steps": 1, "limit_val_batches": 0}
    path = config("SFTModule", trainer=trainer, evaluation={"num_prompts": 0}, checkpoint={"monitor": None})
    script = ["bash", str(ROOT / "configs" / "trainer" / "slurm.sbatch"), path]

    def submit(*options: str) -> subprocess.Popen[str]:
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([*script, *options], cwd=ROOT, env=environment, start_new_session=True, **streams)

    run = tmp_path / "run"
    first = submit()
    wait_for(lambda: len(logged_steps(run)) > 3, first)
    for process in Path("/proc").glob("[0-9]*"):  # SLURM tells every task
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if words[0].endswith(b"python") and path.encode() in words and os.getsid(int(process.name)) == first.pid:
                os.kill(int(process.name), signal.SIGUSR1)
    output = first.communicate(timeout=60)[0]
    assert first.returncode == 143, output[-3000:]
    assert (tmp_path / "queued").read_text() == "requeue 4242\n"
    (saved,) = run.glob("hpc_ckpt_*.ckpt")
    step = torch.load(saved / "meta.pt", weights_only=True)["global_step"]
    again = submit("--trainer.max_epochs", "-1", "--trainer.max_steps", str(step + 3))
    output = again.communicate(timeout=120)[0]
    assert again.returncode == 0, output[-3000:]
    assert logged_steps(run) == list(range(step + 3))
    assert (run / "final" / "model.safetensors").is_file()
