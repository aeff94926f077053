"""However an optimiser step's rows are split and laid out, its gradient is the same."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lightning_modules.forward.capabilities import Capabilities
from tests.kills import METHODS
from tests.splitting import ROWS, command, gradients, left_padded, make_material

ROOT = Path(__file__).parents[1]
SPLITS: dict[str, dict[str, Any]] = {
    "8x1": {"batch_size": 8},
    "4x2": {"batch_size": 4, "accumulate": 2},
    "2x4": {"batch_size": 2, "accumulate": 4},
    "1x8": {"batch_size": 1, "accumulate": 8},
    "3x3": {"batch_size": 3, "accumulate": 3},  # the last batch has two rows
    "tokens": {"tokens_per_batch": 200, "accumulate": 100},
}
CAPABILITIES = "lightning_modules.forward.completions.capabilities"
LAYOUTS = {
    "padded": mock.patch(CAPABILITIES, return_value=Capabilities(0.0, True)),
    "whole_logits": mock.patch(CAPABILITIES, return_value=Capabilities(0.0, False)),
    "left": mock.patch("datamodules.batches.pad", left_padded),
}
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("splitting")
    make_material(directory)
    return directory


def assert_same(found: Tensor, expected: Tensor, told: str) -> None:
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    assert expected.count_nonzero() > len(expected) // 2, "a gradient that is mostly zero tells little"
    assert difference <= TOLERANCE, f"{told}: {difference}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("cli")
@pytest.mark.parametrize("method", METHODS)
def test_a_step_s_gradient_is_the_same_however_its_rows_are_split_and_laid_out(
    method: str, material: Path, tmp_path: Path
) -> None:
    def step(name: str, **options: Any) -> Tensor:
        (found,) = gradients(command(material, tmp_path / name, method, **options))
        return found

    expected = step("whole", batch_size=ROWS)
    for name, split in SPLITS.items():
        if method != "RLOOModule" or name != "tokens":
            assert_same(step(name, **split), expected, name)
    for name, layout in LAYOUTS.items():
        with layout:
            assert_same(step(name, batch_size=4, accumulate=2), expected, name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("cli")
@pytest.mark.parametrize("method", METHODS)
def test_the_short_last_window_of_an_epoch_is_weighted_by_what_it_holds(
    method: str, material: Path, tmp_path: Path
) -> None:
    """Windows of three, three and two rows: together they weigh as the eight, each by its number of units."""
    windows = gradients(command(material, tmp_path / "windows", method, batch_size=1, accumulate=3))
    batches = gradients(command(material, tmp_path / "batches", method, batch_size=3))
    assert len(windows) == len(batches) == 3
    for number, (window, batch) in enumerate(zip(windows, batches, strict=True)):
        assert_same(window, batch, f"window {number}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("cli")
@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_s_gradient_is_the_same_on_two_ranks(material: Path, tmp_path: Path, sharded: bool) -> None:
    command_line = [sys.executable, "-m", "tests.splitting", str(material), *(["--sharded"] if sharded else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command_line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    for method in METHODS:
        (expected,) = gradients(command(material, tmp_path / method, method, batch_size=ROWS))
        (found,) = torch.load(material / f"{method}.pt", weights_only=True)
        assert_same(found, expected, method)
