"""``configs`` and ``doctor``: what ships, copies, versions, launchers that contradict the trainer, an all-reduce."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from commands import doctor
from commands.configs import FOLDER, ready_configs
from commands.doctor import Finding, launch, package, pinned_versions
from tests.command_line import Cli, assert_refused

ROOT = Path(__file__).parents[1]


def test_every_config_is_listed_with_what_it_trains_and_needs(cli: Cli) -> None:
    shown = cli("configs").stdout
    for file in FOLDER.rglob("*.yaml"):
        assert f"\n{file.relative_to(FOLDER).with_suffix('')} " in f"\n{shown}"
    by_name = {ready.name: ready for ready in ready_configs()}
    assert by_name["sft"][1:4] == ("SFT", "Qwen/Qwen2.5-0.5B", "SmolTalk")
    assert by_name["rloo"].needs == "outputs/sft/final, outputs/reward/final, NVIDIA_API_KEY for the judge, a GPU"
    assert "NVIDIA_API_KEY" not in by_name["reward"].needs  # which cannot answer, and is not judged
    assert "GPU" not in by_name["demo/dpo"].needs
    assert by_name["adapters/lora"].needs == "changes model of the config before it"
    assert max(map(len, shown.splitlines())) <= 110


def test_a_config_is_copied_as_it_is_and_never_over_a_file(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "mine.yaml"
    assert cli("configs", "copy", "demo/dpo", str(target)).returncode == 0
    assert target.read_text() == (FOLDER / "demo" / "dpo.yaml").read_text()
    target.write_text("changed")
    assert_refused(cli("configs", "copy", "sft", str(target)), "exists and is not replaced")
    assert target.read_text() == "changed"
    assert_refused(cli("configs", "copy", "demo/dop"), "did you mean demo/dpo?")
    assert_refused(cli("configs", "cpoy", "sft"), "invalid choice: 'cpoy'")
    assert_refused(cli("configs", "copy", "sft", str(target / "below.yaml")), "name another file")


def test_configs_imports_nothing_large() -> None:
    code = "import sys, cli; cli.main(['configs']); sys.exit('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert found.returncode == 0


def test_the_pinned_versions_are_those_of_the_constraints() -> None:
    assert pinned_versions("# c\na==1.2\nb==3 # d\n\n") == {"a": "1.2", "b": "3"}


@pytest.mark.parametrize(
    ("found", "level"),
    [("2.13.0", "ok"), ("2.13.0+cpu", "ok"), ("2.13.4", "ok"), ("2.14.0", "note"), ("3.13.0", "note"), ("", "bad")],
)
def test_another_release_is_noted_and_a_missing_package_is_bad(
    found: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "installed", lambda _: found)
    assert package("torch", "2.13.0").level == level


SLURM = {"SLURM_NTASKS": "16", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "train"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "trainer", "levels"),
    [
        (SLURM, {"devices": 8, "num_nodes": 2}, ["ok", "ok"]),
        (SLURM, {"devices": 4, "num_nodes": 2}, ["ok", "bad"]),
        (SLURM, {"devices": 8}, ["bad", "ok"]),
        (SLURM, {"devices": "auto", "num_nodes": 2}, ["ok"]),
        ({**SLURM, "SLURM_JOB_NAME": "bash"}, {"devices": 4}, ["ok"]),  # in which Lightning starts processes itself
        (TORCHRUN, {"devices": 4, "num_nodes": 2}, ["ok", "ok"]),
        (TORCHRUN, {"devices": 2, "num_nodes": 1}, ["bad", "bad"]),
        ({}, {"devices": 2}, ["ok"]),
    ],
)
def test_a_launcher_and_a_trainer_that_contradict_each_other_are_told(
    environment: dict[str, str], trainer: dict[str, Any], levels: list[str]
) -> None:
    assert [finding.level for finding in launch(environment, trainer)] == levels


def test_the_doctor_ends_with_one_where_a_run_would_fail(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("doctor", "--offline").returncode == 0
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    config = tmp_path / "trainer.yaml"
    config.write_text("trainer: {devices: 4, num_nodes: 2}")
    result = cli("doctor", "--offline", "--config", str(config))
    assert result.returncode == 1
    assert re.search(r"bad +SLURM +trainer.devices is 4, and SLURM's --ntasks-per-node 8; change one", result.stdout)


def test_what_does_not_answer_is_noted_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_BASE_URL", "HF_ENDPOINT"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    found = {finding.what: finding for finding in doctor.reach()}
    assert found["W&B"] == Finding(
        "note", "W&B", "http://127.0.0.1:9 does not answer (ConnectionError): runs are recorded offline"
    )
    assert "name local directories" in found["hub"].told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--processes", "1"], "--processes must be at least 2, got 1"),
        (["--processes", "x"], "--processes"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml does not exist"),
    ],
)
def test_what_the_doctor_cannot_do_is_refused(arguments: list[str], told: str, cli: Cli) -> None:
    assert_refused(cli("doctor", "--offline", *arguments), told)


def test_processes_of_this_machine_reach_each_other() -> None:
    command = [sys.executable, "cli.py", "doctor", "--offline", "--processes", "2"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert found.returncode == 0, found.stderr
    assert re.search(r"ok +processes +2 by gloo: an all-reduce in", found.stdout)
