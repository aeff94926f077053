"""A checkpoint is whole or absent, whatever kills the write, and the newest whole one is resumed from."""

import dataclasses
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import FileSystemWriter

from callbacks.checkpoints import checkpoint_io, sharded_checkpoint, sharded_files
from callbacks.checkpoints.boundary_checkpoint import BoundaryCheckpoint
from callbacks.checkpoints.checkpoint_io import (
    RESUMABLE,
    WholeCheckpointIO,
    newest_usable,
    unusable,
    write_checkpoint,
)
from core.errors import ConfigurationError, NotWrittenError
from tests.command_line import Cli, assert_refused

ROOT = Path(__file__).parents[1]
CHECKPOINT: dict[str, Any] = {name: {} for name in RESUMABLE} | {"state_dict": {"w": torch.arange(100_000.0)}}

KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from callbacks.checkpoints.checkpoint_io import WholeCheckpointIO, unusable
folder, kills = Path(sys.argv[1]), int(sys.argv[2])
target, random_ = folder / "last.ckpt", random.Random(0)
def save(generation):
    weights = {str(i): torch.full((50_000,), float(generation)) for i in range(10)}
    WholeCheckpointIO().save_checkpoint({"state_dict": weights, "generation": generation}, target)
save(0)
started = time.monotonic()
save(1)
write_s, left = time.monotonic() - started, 0
for _ in range(kills):
    before = torch.load(target, weights_only=True)["generation"]
    begun, begins = os.pipe()
    child = os.fork()
    if child == 0:
        generation = before
        while True:
            generation += 1
            os.write(begins, b".")
            save(generation)
    os.close(begins)
    for _ in range(random_.randint(1, 3)):
        os.read(begun, 1)
    time.sleep(random_.uniform(0.0, 0.9 * write_s))
    os.kill(child, signal.SIGKILL)
    os.close(begun)
    os.waitpid(child, 0)
    left += len(list(folder.iterdir())) - 1
    assert unusable(target, ("state_dict",)) == "", unusable(target, ())
    found = torch.load(target, weights_only=True)
    assert found["generation"] >= before
    assert all(torch.all(w == found["generation"]) for w in found["state_dict"].values())
print(found["generation"], left, write_s, file=sys.stderr)
print(found["generation"], left)
"""


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_a_kill_while_writing_leaves_the_old_file_or_the_new_one(kills: int, tmp_path: Path) -> None:
    """Also where TMPDIR lies on another file system.

    The kills fall within the first three writes, which say that they begin: outside of one they would prove nothing.
    """
    elsewhere = "/dev/shm" if Path("/dev/shm").is_dir() else str(tmp_path)
    environment = {**os.environ, "TMPDIR": elsewhere, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLS, str(tmp_path / "run"), str(kills)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    written, interrupted = map(int, result.stdout.split())
    assert written > kills // 4
    assert interrupted > kills // 8
    write_checkpoint(CHECKPOINT, tmp_path / "run" / "last.ckpt")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["last.ckpt"]


def test_what_another_run_is_writing_in_the_same_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "other.ckpt.partial").write_bytes(b"half")
    (tmp_path / "last.ckpt.partial").write_bytes(b"left by a kill")
    write_checkpoint(CHECKPOINT, tmp_path / "last.ckpt")
    assert {file.name for file in tmp_path.iterdir()} == {"last.ckpt", "other.ckpt.partial"}


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """No file may grow beyond 60,000 bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files_only")
def test_a_full_disk_is_one_line_and_costs_no_checkpoint(tmp_path: Path) -> None:
    target = tmp_path / "last.ckpt"
    write_checkpoint({"state_dict": {"w": torch.ones(10)}}, target)
    before = target.read_bytes()
    with pytest.raises(ConfigurationError, match=r"cannot write .*last.ckpt \(File too large\).*checkpoint.dirpath"):
        write_checkpoint(CHECKPOINT, target)
    assert target.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_that_cannot_be_written_is_an_error_and_not_silence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigurationError, match="cannot write the checkpoint"):
        write_checkpoint(CHECKPOINT, tmp_path / "file" / "last.ckpt")
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o500)
    if not os.access(closed, os.W_OK):
        with pytest.raises(ConfigurationError, match="Permission denied"):
            write_checkpoint(CHECKPOINT, closed / "last.ckpt")


def test_an_error_that_is_no_disk_s_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises((pickle.PicklingError, AttributeError)):  # which of the two depends on Python's version
        write_checkpoint({"function": lambda: None}, tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []


def at(path: Path, moment: int) -> Path:
    """The file, as if written at a moment."""
    os.utime(path, (moment, moment))
    return path


def test_resuming_passes_over_what_is_not_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Truncated, damaged in one byte, foreign, weights alone, empty: each is newer than the one that is taken."""
    good = tmp_path / "best-epoch=1.ckpt"
    write_checkpoint(CHECKPOINT, tmp_path / "best-epoch=0.ckpt")
    write_checkpoint(CHECKPOINT, good)
    content = good.read_bytes()
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 1
    bad = {"truncated": content[:-500], "damaged": bytes(damaged), "foreign": b"PK no checkpoint", "empty": b""}
    for name, text in bad.items():
        (tmp_path / f"{name}.ckpt").write_bytes(text)
    write_checkpoint({"state_dict": {}}, tmp_path / "weights.ckpt")
    at(tmp_path / "best-epoch=0.ckpt", 100)
    at(good, 200)
    for moment, name in enumerate([*bad, "weights"], start=300):
        at(tmp_path / f"{name}.ckpt", moment)
    caplog.set_level("INFO")
    assert newest_usable(list(tmp_path.glob("*.ckpt"))) == good
    assert caplog.text.count("passing over") == 5
    assert all(unusable(tmp_path / f"{name}.ckpt", ()) for name in bad)
    good.unlink()
    (tmp_path / "best-epoch=0.ckpt").unlink()
    with pytest.raises(ConfigurationError, match=r"none of the 5 checkpoints in .* can be resumed from"):
        newest_usable(list(tmp_path.glob("*.ckpt")))
    assert newest_usable([]) is None


def test_a_symbolic_last_is_never_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every change of the link is a rename onto it."""
    names = ["first.ckpt", "second.ckpt"]
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    link = tmp_path / "last.ckpt"
    monkeypatch.setattr(os, "remove", lambda path: pytest.fail(f"{path} removed"))
    for name in names:
        write_checkpoint(CHECKPOINT, tmp_path / name)
        BoundaryCheckpoint._link_checkpoint(trainer, str(tmp_path / name), str(link))
        assert link.resolve().name == name
    assert {file.name for file in tmp_path.iterdir()} == {*names, "last.ckpt"}


def test_loading_is_of_plain_values_whatever_is_asked_for(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "canary"),)

    torch.save({"state_dict": Payload()}, tmp_path / "last.ckpt")
    with pytest.raises(ConfigurationError, match="something else than tensors and plain values"):
        WholeCheckpointIO().load_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert not (tmp_path / "canary").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["SFTModule", "RewardModule", "DPOModule", "RLOOModule"])
def test_a_checkpoint_is_the_trained_weights_and_two_moments_alone(
    method: str, config: Any, tmp_path: Path, tiny_model_dir: Path, cli: Cli
) -> None:
    """At most 3.1 times the weights beside a fixed part: no reference, no second copy of anything."""
    result = cli("fit", "--config", config(method, evaluation={"num_prompts": 0}))
    assert result.returncode == 0, result.stderr
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)
    weights = sum(tensor.untyped_storage().nbytes() for tensor in distinct(saved["state_dict"].values()))
    held = sum(tensor.untyped_storage().nbytes() for tensor in distinct(tensors_in(saved)))
    assert weights <= (tiny_model_dir / "model.safetensors").stat().st_size * 1.1
    assert held <= 3.1 * weights
    assert not any("reference" in name for name in saved["state_dict"])


def tensors_in(content: Any) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, (dict, list, tuple)):
        for value in content.values() if isinstance(content, dict) else content:
            yield from tensors_in(value)


def distinct(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """One tensor for each storage, as tied weights are stored once."""
    return list({tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}.values())


@pytest.mark.filterwarnings("default")
def test_a_fit_on_a_full_disk_goes_on_with_the_checkpoints_that_it_has(
    config: Any, tmp_path: Path, cli: Cli, request: pytest.FixtureRequest, recwarn: pytest.WarningsRecorder
) -> None:
    path, folder = config("SFTModule", evaluation={"num_prompts": 0}), tmp_path / "run" / "checkpoints"
    assert cli("fit", "--config", path).returncode == 0
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    request.getfixturevalue("small_files_only")
    result = cli("fit", "--config", path, "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert result.returncode == 0, result.stderr
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    told = [str(warning.message) for warning in recwarn.list]
    assert any("training goes on without a checkpoint of this step: cannot write" in line for line in told)


@pytest.mark.filterwarnings("ignore")
def test_a_disk_with_room_again_takes_the_next_checkpoint_and_none_is_lost_meanwhile(
    config: Any, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The better ones that were not written push out no worse one that is there."""
    whole = checkpoint_io.write_checkpoint
    there: dict[int, set[str]] = {}

    def write(checkpoint: dict[str, Any], target: Path) -> None:
        there.setdefault(checkpoint["global_step"], {file.name for file in target.parent.glob("*")})
        if checkpoint["global_step"] == 4:
            raise NotWrittenError(f"cannot write the checkpoint {target} (Read-only file system)")
        whole(checkpoint, target)

    monkeypatch.setattr(checkpoint_io, "write_checkpoint", write)
    options = {"evaluation": {"num_prompts": 0}, "checkpoint": {"monitor": "val/loss", "filename": "{step}"}}
    path = config("SFTModule", trainer={"max_epochs": 3}, model={"learning_rate": 0.01}, **options)
    assert cli("fit", "--config", path).returncode == 0
    assert there[4] == {"step=2.ckpt", "last.ckpt"}
    assert {"step=2.ckpt", "last.ckpt"} <= there[6], "nothing that was there is gone"
    assert {file.name for file in (tmp_path / "run" / "checkpoints").iterdir()} == {"step=6.ckpt", "last.ckpt"}


@pytest.mark.filterwarnings("ignore")
def test_a_truncated_last_checkpoint_costs_no_more_than_itself(
    config: Any, tmp_path: Path, cli: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes on from the best one, says so, and leaves a whole ``last.ckpt``."""
    path = config("SFTModule", evaluation={"num_prompts": 0})
    assert cli("fit", "--config", path).returncode == 0
    caplog.set_level("INFO")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    os.truncate(last, last.stat().st_size - 1000)
    result = cli("fit", "--config", path, "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert result.returncode == 0, result.stderr
    assert f"passing over {last}: it is truncated, or no checkpoint" in caplog.text
    assert unusable(last, RESUMABLE) == ""
    assert torch.load(last, weights_only=True)["epoch"] == 1
    names = {file.name for file in last.parent.iterdir()}  # the one resumed from stays, no second version is made
    assert names <= {"best-epoch=0.ckpt", "best-epoch=1.ckpt", "last.ckpt"}


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_folder_that_cannot_be_written_stops_the_run(config: Any, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "file").write_text("no folder")
    options = {"num_prompts": 0}
    path = config("SFTModule", evaluation=options, checkpoint={"dirpath": str(tmp_path / "file" / "inside")})
    assert_refused(cli("fit", "--config", path), "cannot write")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("copied", [False, True])
def test_a_sharded_checkpoint_s_index_is_read_without_running_it(
    copied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a version of torch that completes a copy of the index, and gives the other one to who saves."""
    finishes = FileSystemWriter.finish
    if copied:
        monkeypatch.setattr(
            FileSystemWriter, "finish", lambda self, index, results: finishes(self, dataclasses.replace(index), results)
        )

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "canary"),)

    folder = tmp_path / "last.ckpt"
    damaged = "it is not whole, or holds something else than tensors and plain values"

    def saved(**more: Any) -> tuple[Path, Any]:
        sharded_files.make_empty(partial := tmp_path / "last.ckpt.partial")
        writer = sharded_checkpoint.Writer(partial)
        index = distributed_checkpoint.save({"w": torch.ones(3), **more}, storage_writer=writer, no_dist=True)
        return partial, index

    def finish(partial: Path, index: Any) -> None:
        sharded_checkpoint.finish(partial, folder, {"epoch": 1}, index)

    saved()[0].rename(folder)
    assert unusable(folder, ()) == damaged  # a kill came before the list of files
    finish(*saved())
    assert unusable(folder, ()) == ""
    assert list(tmp_path.iterdir()) == [folder]
    (part,) = folder.glob("*.distcp")
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert unusable(folder, ()) == f"{part.name} in it is damaged"
    part.write_bytes(content)
    assert unusable(folder, ()) == ""
    part.unlink()
    assert unusable(folder, ()) == damaged
    finish(*saved(n={"count": 1}))
    assert unusable(folder, ()) == damaged  # what is no tensor is a pickle that torch loads
    finish(*saved())
    (folder / ".metadata").write_bytes(pickle.dumps(Payload()))
    assert unusable(folder, ()) == damaged
    assert not (tmp_path / "canary").exists()


def test_bytes_reach_the_disk_before_the_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this order alone does a power cut leave the old file or the new one."""
    order: list[str] = []
    sync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        order.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        sync(descriptor)

    def replaced(source: Any, target: Any) -> None:
        order.append(f"{Path(source).name} becomes {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_checkpoint(CHECKPOINT, tmp_path / "run" / "last.ckpt")
    assert order == ["sync last.ckpt.partial", "last.ckpt.partial becomes last.ckpt", "sync run"]
