"""Processes that load in turns, and what the machine has left for them."""

import math
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from core import memory, turns
from lightning_modules import RLOOModule, SFTModule, base, rloo
from lightning_modules.models import reference, sharding
from lightning_modules.models.loading import float32_bytes
from lightning_modules.rewards.rules import brevity

HOLDS = """
import sys, time
from core import turns
turns.NAME, turns.available_bytes = sys.argv[1].replace("@", chr(0)), lambda: 1.0
with turns.in_turn(1.0):
    print("here", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Of turns that nobody else takes."""
    own = f"@{tmp_path.name}-{time.monotonic_ns()}-{{number}}"
    monkeypatch.setattr(turns, "NAME", own.replace("@", "\0"))
    return own


@pytest.mark.parametrize(("room", "most"), [(0.5, 1), (1.9, 1), (2.0, 2), (9.0, 4), (math.inf, 4)])
@pytest.mark.usefixtures("name")
def test_as_many_are_at_it_as_there_is_room_for(room: float, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "available_bytes", lambda: room * 100)
    monkeypatch.setattr(turns, "POLL_S", 0.005)
    here, seen, waited, lock = [0], list[int](), list[int](), threading.Lock()

    def work() -> None:
        with turns.in_turn(100.0, lambda: waited.append(1)) as count:
            assert count >= most
            with lock:
                here[0] += 1
                seen.append(here[0])
            while len(seen) + len(waited) < 4:  # until each is here or has been made to wait
                time.sleep(0.001)
            with lock:
                here[0] -= 1

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert max(seen) == most
    assert len(seen) == 4
    assert len(waited) == 4 - most


def test_a_process_that_is_killed_gives_up_its_turn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "available_bytes", lambda: 1.0)
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, name], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "here\n"
    assert turns._take(1) is None
    holder.kill()
    holder.communicate()
    with turns.in_turn(1.0) as count:
        assert count == 1


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({}, 8_000 * 1024),
        ({"": (5_000, 3_000, 500)}, 2_500),
        ({"": ("max", 1, 0)}, 8_000 * 1024),
        ({"job": (5_000, 3_000, 500), "job/step": (9_000, 1_000, 0)}, 2_500),
        ({"other": (10, 9, 0)}, 8_000 * 1024),
    ],
)
def test_what_is_left_is_the_machines_or_that_of_the_group_with_least(
    limits: dict[str, tuple[object, int, int]],
    left: float,
    version: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    names = ("max", "current", "") if version == 2 else ("limit_in_bytes", "usage_in_bytes", "total_")
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    first = "/elsewhere" if version == 2 else "/job/step"
    (tmp_path / "cgroup").write_text(f"2:cpu:/job\n4:memory:{first}\n0::/{'job/step' if version == 2 else ''}\n")
    for group, (limit, used, files) in limits.items():
        folder = tmp_path / "groups" / ("" if version == 2 else "memory") / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"memory.{names[0]}").write_text(f"{limit}\n")
        (folder / f"memory.{names[1]}").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 7\n{names[2]}inactive_file {files}\nactive_file 3\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "GROUP_ROOT", tmp_path / "groups")
    assert memory.available_bytes() == left
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "none")
    assert memory.available_bytes() == math.inf


def test_a_model_that_is_to_be_shared_is_whole_within_a_turn_alone(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so is what it is compared with, after it: never are both whole at once."""
    told: list[str] = []
    cut_up = sharding.Sharding(Any, None)  # type: ignore[arg-type]  # no mesh, as nothing is cut up here

    @contextmanager
    def turn(needed: float, on_wait: Any) -> Iterator[int]:
        assert needed == sharding.WHILE_LOADED * float32_bytes(str(tiny_model_dir)) > 4 * 8_000
        told.append("begins")
        yield 1
        told.append("ends")

    def shard(model: Any, how: Any) -> None:
        assert model.training == (len(told) == 1), "the policy first, then the reference, which never trains"
        told.append("shards")

    monkeypatch.setattr(sharding, "in_turn", turn)
    monkeypatch.setattr(rloo, "copy", types.SimpleNamespace())  # no copy is made
    for module in (base, reference):
        monkeypatch.setattr(module, "shard", shard)
    monkeypatch.setattr(reference, "sharding_of", lambda model: cut_up)
    for method, expected in ((SFTModule, 1), (RLOOModule, 2)):
        told.clear()
        options = {"reward": brevity} if method is RLOOModule else {}
        trained: Any = method(model_name=str(tiny_model_dir), **options)
        strategy = types.SimpleNamespace(sharding=cut_up)
        trained._trainer = types.SimpleNamespace(strategy=strategy, num_devices=2, datamodule=None, precision="32-true")
        trained.configure_model()
        assert told == ["begins", "shards", "ends"] * expected
