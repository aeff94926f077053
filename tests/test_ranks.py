"""Work that two processes share: each sees what all did, and a failure of one ends both."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import DistBackendError

from cli import lost_process
from core.errors import ProcessError
from core.ranks import Ranks
from datamodules.shards import ShardSampler
from tests.kills import METHODS

ROOT = Path(__file__).parents[1]


def process(rank: int, store: str, results: Any) -> None:
    """What each of two processes does: a share, then one that fails on the second process alone."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    ranks: Ranks[Any] = Ranks(60.0)
    results.put((rank, "shares", ranks.gather(lambda: f"of {rank}")))

    def fails_on_one() -> int:
        if rank == 1:
            raise ValueError("the disk is full")
        return 1

    try:
        ranks.gather(fails_on_one)
        results.put((rank, "passed", None))
    except Exception as error:
        results.put((rank, type(error).__name__, str(error)))
    dist.destroy_process_group()


def test_shares_go_to_all_and_a_failure_too(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=process, args=(rank, str(tmp_path / "store"), results)) for rank in range(2)]
    for started in processes:
        started.start()
    found = sorted(results.get(timeout=60) for _ in range(4))
    for started in processes:
        started.join(30)
    shares = ["of 0", "of 1"]
    told = "process 1 failed: ValueError: the disk is full"
    assert [line for line in found if line[1] == "shares"] == [(0, "shares", shares), (1, "shares", shares)]
    assert (0, "ProcessError", told) in found
    assert (1, "ValueError", "the disk is full") in found


def test_alone_the_work_is_done_and_its_error_raised() -> None:
    assert Ranks(1.0).gather(lambda: 3) == [3]


def in_a_process_of_its_own(module: str, *options: str) -> str:
    """Run a script that forks, which a process of pytest's must not; its table."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # no GPU outlives a fork
    command = [sys.executable, "-m", module, *options]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    return result.stdout


def test_a_rank_that_fails_or_is_killed_ends_the_others_at_once() -> None:
    table = in_a_process_of_its_own("tests.hangs", "--cases", "reward-raises", "killed-in-a-step")
    assert len(table.splitlines()) == 5


@pytest.mark.slow
def test_a_rank_that_fails_anywhere_ends_the_others_at_once_and_a_slow_reward_is_waited_for() -> None:
    in_a_process_of_its_own("tests.hangs")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "ranks"), list(zip(METHODS, "3232", strict=True)))
def test_validation_figures_are_the_same_on_one_to_three_processes(method: str, ranks: str) -> None:
    """Of one to nine rows on two and three, with a token budget too, by ``python -m tests.shards``, in five minutes."""
    in_a_process_of_its_own("tests.shards", "--methods", method, "--ranks", ranks, "--rows", "1", "4", "7")


@pytest.mark.slow
@pytest.mark.parametrize("room", [True, False])
def test_validation_figures_are_the_same_where_three_processes_share_a_model(room: bool) -> None:
    """With a copy of the whole to sample from, and gathering layer by layer for every token."""
    more = ["--methods", "SFTModule", "RLOOModule"] if room else ["--cramped", "--methods", "RLOOModule"]
    in_a_process_of_its_own("tests.shards", "--sharded", "--ranks", "3", "--rows", "1", "4", "7", *more)


@pytest.mark.slow
def test_a_process_that_fails_ends_those_that_share_its_model_at_once() -> None:
    in_a_process_of_its_own("tests.hangs", "--sharded", "--cases", "killed-in-sampling", "completing-raises")


@pytest.mark.slow
def test_runs_that_share_a_model_and_are_killed_go_on_exactly() -> None:
    options = ["--ranks", "2", "--sharded", "--workers", "0", "--kills", "2"]
    in_a_process_of_its_own("tests.kills", *options, "--methods", "SFTModule", "RLOOModule")


@pytest.mark.parametrize("count", range(1, 10))
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_item_of_a_validation_counts_once(count: int, world_size: int, size: int) -> None:
    shards = [ShardSampler(range(count), world_size, rank, items_per_batch=size) for rank in range(world_size)]
    batches = [[list(shard)[at : at + size] for at in range(0, len(shard), size)] for shard in shards]
    assert len({len(own) for own in batches}) == 1, "each process keeps step"
    assert len(batches[0]) == -(-len(range(0, count, world_size)) // size) > 0, "and none takes a batch too many"
    counted = [item for shard, own in zip(shards, batches, strict=True) for b in own[: shard.counted] for item in b]
    assert sorted(counted) == list(range(count))


def test_what_another_process_s_end_does_to_this_one_is_one_line() -> None:
    reset = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:16613: Connection reset by peer")
    assert lost_process(ProcessError("process 1 failed: ValueError: no")) == "process 1 failed: ValueError: no"
    assert lost_process(reset).startswith("another process of this run ended")
    assert lost_process(DistBackendError("NCCL error: remote process exited")).startswith("another process of this run")
    assert not lost_process(RuntimeError("shapes differ"))
    assert not lost_process(ValueError("gloo"))
