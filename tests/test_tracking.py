"""W&B's names and modes: never a question, offline where nobody is logged in."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from callbacks.logging.tracking import WandbTracking, environment_mode, run_name, trackers


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_without_a_key_runs_are_recorded_offline() -> None:
    assert environment_mode() == "offline"


def test_a_key_in_the_environment_or_from_wandb_login_means_online(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    netrc.chmod(0o600)
    assert environment_mode() == "online"
    netrc.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert environment_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert environment_mode() == "disabled"


@pytest.mark.parametrize(
    ("model", "dataset", "name"),
    [
        ("Qwen/Qwen2.5-0.5B", "HuggingFaceTB/smol-smoltalk", "sft-Qwen2.5-0.5B-smol-smoltalk"),
        ("outputs/sft/final", "data/pairs.parquet", "sft-sft-pairs"),
        ("outputs/sft/final", "pairs.jsonl.gz", "sft-sft-pairs"),
    ],
)
def test_a_run_is_named_after_method_model_and_dataset(model: str, dataset: str, name: str) -> None:
    assert run_name("sft", model, dataset) == name


@pytest.mark.filterwarnings("ignore")
def test_project_group_and_job_type_reach_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    logger = WandbTracking(
        save_dir=str(tmp_path / "run"), name="n", job_type="dpo", group="g", tags=["t"], mode="disabled"
    )
    assert logger._wandb_init["project"] == "mine"
    assert {key: logger._wandb_init[key] for key in ("name", "job_type", "group", "tags")} == {
        "name": "n",
        "job_type": "dpo",
        "group": "g",
        "tags": ["t"],
    }
    monkeypatch.delenv("WANDB_PROJECT")
    default = WandbTracking(save_dir=str(tmp_path / "run"), mode="disabled")
    assert default._wandb_init["project"] == "cs224r_deeprl_final"


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_is_not_tracked_has_no_tracker_and_uploads_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    options: dict[str, Any] = {"save_dir": str(tmp_path / "run"), "name": "n"}
    assert trackers(mode="disabled", checkpoints="none", **options) == []
    assert not recwarn.list
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert trackers(mode=None, checkpoints="last", **options) == []
    assert [str(warning.message) for warning in recwarn.list] == [
        "wandb.checkpoints=last uploads nothing while W&B is disabled"
    ]
    (logger,) = trackers(mode="offline", checkpoints="none", **options)
    assert (logger._wandb_init["name"], logger._wandb_init["mode"]) == ("n", "offline")


@pytest.fixture
def silent_server() -> Iterator[str]:
    """One that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "silent"])
def test_a_server_that_does_not_answer_means_offline_within_seconds(
    closed: bool, silent_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9" if closed else silent_server)
    began = time.monotonic()
    logger = WandbTracking(save_dir=str(tmp_path / "run"))
    assert time.monotonic() - began < 10
    assert logger._wandb_init["mode"] == "offline"
    assert any("W&B cannot be reached" in str(warning.message) for warning in recwarn.list)


@pytest.mark.filterwarnings("ignore")
def test_a_server_that_refuses_the_key_costs_tracking_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    asked: list[str] = []

    def init(mode: str, **options: Any) -> Any:
        asked.append(mode)
        if mode == "online":
            raise wandb.errors.AuthenticationError("API key verification failed\nand more")
        return object()

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr("callbacks.logging.tracking.unreachable", str)
    logger = WandbTracking(save_dir=str(tmp_path / "run"), mode="online")
    assert logger.experiment is logger.experiment is not None
    assert asked == ["online", "offline"]
    assert any("takes no run (API key verification failed)" in str(warning.message) for warning in recwarn.list)
