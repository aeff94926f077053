"""Work that two processes share: each sees what all did, and a failure of one ends both."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from callbacks.evaluation.ranks import Ranks


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
    assert (0, "RuntimeError", told) in found
    assert (1, "ValueError", "the disk is full") in found


def test_alone_the_work_is_done_and_its_error_raised() -> None:
    assert Ranks(1.0).gather(lambda: 3) == [3]
