"""A model that several processes share: trained, judged, saved and exported as one that is whole."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.checkpoints.checkpoint_io import plain_values
from callbacks.checkpoints.exact_resume import KEY
from datamodules.position import Position
from lightning_modules.models.reference_cache import read_table
from tests.command_line import Cli, assert_refused
from tests.kills import METHODS
from tests.splitting import ROWS, command, losses, make_material
from tests.test_ddp import launch
from tests.test_ranks import in_a_process_of_its_own

ROOT = Path(__file__).parents[1]
OVERLAY = ["--config", "configs/trainer/fsdp.yaml", "--trainer.accelerator", "cpu"]
ALONE = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "auto"]
SLOW = pytest.mark.slow


def assert_same_files(found: Path, expected: Path) -> None:
    """Two exports are the same; cards tell of processes, and the tokenizer's options of how it was loaded."""
    names = sorted(file.name for file in expected.iterdir())
    assert sorted(file.name for file in found.iterdir()) == names
    for name in names:
        if name not in ("README.md", "tokenizer_config.json"):
            assert (found / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "rank"),
    [
        ("SFTModule", 0),
        pytest.param("RewardModule", 0, marks=SLOW),
        pytest.param("DPOModule", 0, marks=SLOW),
        pytest.param("RLOOModule", 4, marks=SLOW),
    ],
)
def test_two_processes_share_a_model_and_one_exports_the_same(
    method: str, rank: int, config: Any, tmp_path: Path, cli: Cli
) -> None:
    adapter = {"lora": {"rank": rank}} if rank else {}
    path = config(method, model=adapter)
    result = launch("fit", "--config", path, *OVERLAY, "--trainer.devices", "2")
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.search(r"^Qwen2For\w+ of [\d,]+ parameters, ", result.stderr, re.MULTILINE), "of the whole, by its name"
    run = tmp_path / "run"
    last = run / "checkpoints" / "last.ckpt"
    assert len(list(last.glob("*.distcp"))) == 2, "each process has written its part"
    assert (run / "eval" / "epoch=0" / "metrics.json").is_file() == (method != "RewardModule")
    if method == "DPOModule":  # whose checkpoint has an optimiser's parts, which a validation has no use for
        against = ["--evaluation.reference_model", str(run / "final"), "--ckpt_path", str(last)]
        judged = launch("validate", "--config", path, *OVERLAY, "--trainer.devices", "2", *against)
        assert judged.returncode == 0, judged.stderr[-3000:]
        assert (run / "eval" / "last" / "metrics.json").is_file()
    names = ["final", *(["adapter"] if rank else [])]
    for name in names:
        shutil.move(run / name, tmp_path / f"{name} of two")
    alone = ["fit", "--config", path, "--ckpt_path", "last", "--model.gradient_checkpointing", "true", *ALONE]
    assert cli(*alone).returncode == 0
    for name in names:
        assert_same_files(run / name, tmp_path / f"{name} of two")


@pytest.mark.slow
def test_a_reference_that_one_process_knows_enough_of_is_asked_by_both(config: Any, tmp_path: Path) -> None:
    """A process that would not ask would leave the other one waiting for its part of the weights."""
    path = config("DPOModule", evaluation={"num_prompts": 0})
    arguments = ["fit", "--config", path, *OVERLAY, "--trainer.devices", "2", "--data.batch_size", "1"]
    assert launch(*arguments).returncode == 0
    (table,) = (tmp_path / "cache").glob("reference-*.jsonl")
    known = read_table(table)
    assert len(known) == 7
    forgotten = min(known)
    table.write_text("".join(json.dumps([key, *known[key]]) + "\n" for key in known if key != forgotten))
    again = launch(*arguments, "--overwrite", "true")
    assert again.returncode == 0, again.stderr[-3000:]
    assert read_table(table) == known


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_one_process_goes_on_with_a_run_of_two_behind_the_rows_that_they_have_seen(
    config: Any, tmp_path: Path, cli: Cli
) -> None:
    """Of seven rows four are seen in two steps of two, so there are three left."""
    trainer = {"log_every_n_steps": 1, "limit_val_batches": 0}
    saves = {"monitor": None, "every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"}
    path = config("SFTModule", trainer=trainer, evaluation={"num_prompts": 0}, checkpoint=saves)
    arguments = ["fit", "--config", path, "--data.batch_size", "1"]
    stopped = launch(*arguments, *OVERLAY, "--trainer.devices", "2", "--trainer.max_steps", "2")
    assert stopped.returncode == 0, stopped.stderr[-3000:]
    second = tmp_path / "run" / "checkpoints" / "step=2.ckpt"
    moved = ["--model.gradient_checkpointing", "true", "--ckpt_path", str(second)]
    with pytest.warns(
        UserWarning, match="is of a run on 2 processes, this one has 1: it goes on from the same weights"
    ):
        assert cli(*arguments, *moved, *ALONE).returncode == 0
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["epoch"]) for line in logged if "train/loss" in line] == [(n, 0) for n in range(5)]
    assert plain_values(second.with_name("step=3.ckpt"), KEY)["position"] == [0, 5], "from where it would go on again"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("cli")
def test_the_losses_of_ten_steps_are_those_of_one_process(tmp_path: Path) -> None:
    make_material(tmp_path)
    in_a_process_of_its_own("tests.splitting", str(tmp_path), "--sharded", "--losses")
    for method in METHODS:
        expected = torch.stack(losses(command(tmp_path, tmp_path / method, method, batch_size=ROWS, moves=True)))
        found = torch.stack(torch.load(tmp_path / f"{method}.pt", weights_only=True))
        assert len(found) == 10
        assert not torch.allclose(expected[0], expected[-1], atol=1e-4), "or nothing was learned"
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_options_that_a_sharded_model_cannot_have_are_refused(config: Any, cli: Cli) -> None:
    arguments = ["fit", "--config", config("DPOModule"), *OVERLAY, "--trainer.devices", "2"]
    for option, value, told in (
        ("trainer.strategy.data_parallel_size", "3", "data_parallel_size must divide the 2 processes, got 3"),
        ("trainer.strategy.tensor_parallel_size", "2", "trainer.strategy.tensor_parallel_size must be 1, got 2"),
        ("trainer.precision", "bf16-true", "trainer.precision must be 32-true or bf16-mixed, got bf16-true"),
        ("model.compile", "true", "a sharded model is not compiled; unset model.compile"),
    ):
        assert_refused(cli(*arguments, f"--{option}", value), told)


@pytest.mark.parametrize(
    ("processes", "was", "multiple", "batches"), [(2, 2, 1, 6), (1, 2, 1, 12), (4, 2, 1, 3), (3, 2, 2, 4), (5, 2, 4, 0)]
)
def test_another_number_of_processes_goes_on_behind_no_row_that_was_not_seen(
    processes: int, was: int, multiple: int, batches: int
) -> None:
    place = Position(1, 6).on(processes, was=was, multiple=multiple)
    assert place == (1, batches)
    assert place.batches * processes <= 6 * was


SAVES = """
import os, random, resource, signal, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from callbacks.checkpoints import sharded_checkpoint
from callbacks.checkpoints.sharded_checkpoint import named_tensors, read_together, write_shards
from commands.checkpoints import resolve_checkpoint
from core.errors import NotWrittenError
folder, kills = Path(sys.argv[1]), int(sys.argv[2])
target, rng = folder / "last.ckpt", random.Random(0)
def save(generation, more={}):
    mesh = init_device_mesh("cpu", (1,))
    parts = {str(i): torch.full((20_000,), float(generation)) for i in range(5)}
    weights = {name: distribute_tensor(part, mesh, [Shard(0)]) for name, part in parts.items()}
    optimizers = [{name: {"step": torch.tensor(float(generation + int(name)))} for name in weights}]
    groups = [{"params": ["1", "0"], "lr": 0.5}, {"params": ["2", "3", "4"], "lr": 0.25}]
    content = {"generation": generation, "param_groups": [groups]}
    write_shards({**named_tensors(weights, optimizers), **more}, content, target)
def connect():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
def found():
    place = Path(resolve_checkpoint("last", folder, folder))
    content = read_together(place)
    generation = content["generation"]
    assert all(torch.all(w == generation) for w in content["state_dict"].values()) and len(content["state_dict"]) == 5
    (optimizer,) = content["optimizer_states"]
    steps = [generation + number for number in (1, 0, 2, 3, 4)]  # in the order in which the groups name them
    assert optimizer["state"] == {n: {"step": torch.tensor(float(step))} for n, step in enumerate(steps)}
    assert optimizer["param_groups"] == [{"params": [0, 1], "lr": 0.5}, {"params": [2, 3, 4], "lr": 0.25}]
    return generation, place
beside = 0
for number in range(kills):
    before = found()[0] if number else 0
    begun, begins = os.pipe()
    child = os.fork()
    if child == 0:
        connect()
        for generation in range(before + 1, 10_000):
            save(generation)
            os.write(begins, b".")
    os.close(begins)
    os.read(begun, 1)
    os.read(begun, 1)
    time.sleep(rng.uniform(0.0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.close(begun)
    os.waitpid(child, 0)
    generation, place = found()
    assert generation >= before + 2, (generation, before)
    beside += len(list(folder.iterdir())) > 1
assert beside, "no kill fell into a save"
connect()
save(10_000)
assert [file.name for file in folder.iterdir()] == ["last.ckpt"]
# a rename that fails, and a disk that is full
rename = Path.rename
def refuse(self, to):
    if self.name.endswith(".partial"):
        raise OSError(13, "Permission denied")
    return rename(self, to)
Path.rename = refuse
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for limits in (None, (60_000, hard), (600_000, hard)):  # the last one stops what is the same on all processes alone
    if limits:
        Path.rename = rename
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    try:
        save(10_001, more={"whole": torch.zeros(300_000)})
    except NotWrittenError as error:
        print(error)
    assert [file.name for file in folder.iterdir()] == ["last.ckpt"] and found()[0] == 10_000
"""


@pytest.mark.parametrize("kills", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_a_kill_or_a_full_disk_leaves_the_old_directory_or_the_new_one(kills: int, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", SAVES, str(tmp_path / "run"), str(kills)]
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    reasons = ("Permission denied", "File too large", "File too large")
    for line, reason in zip(result.stdout.splitlines()[-3:], reasons, strict=True):
        assert line.startswith(f"cannot write the checkpoint {tmp_path / 'run' / 'last.ckpt'} ({reason})")
        assert "the one before it is untouched" in line
