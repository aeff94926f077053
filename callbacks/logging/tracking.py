"""Weights & Biases with the suite's names, offline where nobody is logged in."""

import netrc
import os
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import requests
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from typing_extensions import override

from core.errors import ConfigurationError
from core.secrets import redact
from datamodules.source import FORMATS, plain_name

Mode = Literal["online", "offline", "disabled"]
PROJECT = "cs224r_deeprl_final"
PROBE_S = 4.0
"""For a connection, and again for an answer."""
INIT_TIMEOUT_S = 30.0


class WandbTracking(WandbLogger):
    """WandbLogger that never asks for a login: without a key it records offline, for ``wandb sync`` later.

    Args:
        save_dir: The run's folder.
        name: Run name, ``<method>-<model>-<dataset>``.
        job_type: The method.
        group: Runs that belong together; one pipeline.
        tags: Words to find the run by.
        project: W&B project; the environment's ``WANDB_PROJECT`` goes first.
        mode: ``online``, ``offline`` or ``disabled``; where not given, the environment's ``WANDB_MODE``, else online
            where there is a key.
        checkpoints: Upload ``none``, the ``last`` checkpoints at the end, or ``all`` as they are written.
    """

    def __init__(
        self,
        save_dir: str,
        name: str | None = None,
        job_type: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        project: str = PROJECT,
        mode: Mode | None = None,
        checkpoints: Literal["none", "last", "all"] = "none",
    ) -> None:
        import wandb  # which takes half a second, and a run that tracks nothing does without

        Path(save_dir).mkdir(parents=True, exist_ok=True)
        mode = mode or environment_mode()
        if mode == "online" and rank_zero_only.rank == 0 and (reason := unreachable()):  # type: ignore[attr-defined]
            rank_zero_warn(f"W&B cannot be reached ({reason}), so this run is recorded offline")
            mode = "offline"
        offline = mode != "online"
        upload: Literal["all"] | bool = {"none": False, "last": True, "all": "all"}[checkpoints]  # type: ignore[assignment]
        project = os.environ.get("WANDB_PROJECT", project)
        try:
            named: dict[str, Any] = {"project": project, "run_tags": tags}
            settings = wandb.Settings(silent=offline, init_timeout=INIT_TIMEOUT_S, **named)
        except wandb.errors.UsageError as error:
            raise ConfigurationError(f"{error}; change wandb.project, or WANDB_PROJECT") from error
        except ValueError as error:  # pydantic's, which says much around it
            reason = str(error).partition("Value error, ")[2].partition(" [type=")[0]
            raise ConfigurationError(f"{reason or error}; change wandb.tags") from error
        extra: dict[str, Any] = {"settings": settings, "mode": mode, "job_type": job_type, "group": group, "tags": tags}
        super().__init__(
            name=name,
            save_dir=save_dir,
            project=project,
            offline=offline,
            log_model=upload if not offline else False,
            **extra,
        )
        self._wandb_init.pop("anonymous", None)  # wandb warns of a setting that Lightning hands on unset
        if mode == "offline":
            rank_zero_info(f"W&B records offline; upload with: wandb sync {save_dir}/wandb/latest-run")
        if offline and checkpoints != "none":
            rank_zero_warn(f"wandb.checkpoints={checkpoints} uploads nothing while W&B is {mode}")

    @property
    @rank_zero_experiment
    @override
    def experiment(self) -> Any:
        """The run; offline where W&B takes none now, which costs tracking alone."""
        import wandb

        try:
            return super().experiment
        except wandb.errors.Error as error:
            if self._offline:
                raise
            told = str(error).strip().splitlines() or [type(error).__name__]
            rank_zero_warn(
                f"W&B takes no run ({redact(told[0])[:200]}), so this one is recorded offline; check WANDB_API_KEY"
            )
            self._offline, self._wandb_init["mode"] = True, "offline"
            return super().experiment


def trackers(*, mode: Mode | None, checkpoints: Literal["none", "last", "all"], **options: Any) -> list[WandbTracking]:
    """W&B for a run, by the options of WandbTracking; nothing where it is disabled, which then is not even imported."""
    if (mode or environment_mode()) != "disabled":
        return [WandbTracking(mode=mode, checkpoints=checkpoints, **options)]
    if checkpoints != "none":
        rank_zero_warn(f"wandb.checkpoints={checkpoints} uploads nothing while W&B is disabled")
    return []


def environment_mode() -> Mode:
    """``WANDB_MODE`` where it is set; else online where a key is found, as ``wandb login`` leaves it."""
    asked = os.environ.get("WANDB_MODE")
    if asked in ("online", "offline", "disabled"):
        return asked  # type: ignore[return-value]
    return "online" if os.environ.get("WANDB_API_KEY") or _logged_in() else "offline"


def unreachable() -> str:
    """Why W&B's server does not answer; empty where it does, whatever it says."""
    import wandb

    try:
        requests.head(wandb.Settings().base_url, timeout=PROBE_S, allow_redirects=False)
    except requests.RequestException as error:
        return type(error).__name__
    return ""


def _logged_in() -> bool:
    import wandb

    hosts = {urlparse(address).hostname or "" for address in (wandb.Settings().base_url, "https://api.wandb.ai")}
    try:
        return any(netrc.netrc().authenticators(host) is not None for host in hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def run_name(method: str, model_name: str, dataset_name: str) -> str:
    """``<method>-<model>-<dataset>``, of hub ids and of directories alike; ``outputs/sft/final`` is called ``sft``."""
    return "-".join([method, short_name(model_name), short_name(dataset_name)])


def short_name(name: str) -> str:
    """The last part of a hub id or path that says something; of several names each one's."""
    if " + " in name:
        return "+".join(map(short_name, name.split(" + ")))
    path = Path(name)
    if path.name == "final":
        return path.parent.name
    file = plain_name(path)
    return file.stem if file.suffix in FORMATS else path.name
