"""What a config may not decide: whose key goes to which host, and what is written outside the run's folder."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands.boundaries import check_boundaries, refuse_nulls
from commands.parsing import check_arguments
from core.errors import ConfigurationError
from core.imports import shadowed
from core.plain import DEEPEST, LARGEST, MOST
from lightning_modules.rewards import VLLMReward
from lightning_modules.rewards.keys import checked_url, key_for
from tests.command_line import Cli, assert_refused

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[1]
NVIDIA, OWN = "nvapi-the-owner-is-nvidia", "the-key-of-a-server"


@pytest.mark.parametrize(
    ("url", "named", "sent"),
    [
        ("https://integrate.api.nvidia.com/v1", "", NVIDIA),
        ("https://nvidia.com/v1", "", NVIDIA),
        ("http://integrate.api.nvidia.com/v1", "", ""),
        ("https://integrate.api.nvidia.com.evil.org/v1", "", ""),
        ("https://evilnvidia.com/v1", "", ""),
        ("https://integrate.api.nvidia.com/v1", "integrate.api.nvidia.com", NVIDIA),
        ("http://127.0.0.1:8000/v1", "", ""),
        ("http://127.0.0.1:8000/v1", "127.0.0.1", ""),
        ("http://127.0.0.1:8000/v1", "127.0.0.1:8000", OWN),
        ("http://127.0.0.1:8000/v1", "localhost:8000", ""),
        ("http://localhost.evil.org:8000/v1", "localhost.evil.org:8000", ""),
        ("http://127.0.0.1.evil.org/v1", "127.0.0.1.evil.org", ""),
        ("http://judge.lab:8000/v1", "judge.lab:8000", ""),
        ("https://judge.lab/v1", "judge.lab", OWN),
        ("https://judge.lab:443/v1", "judge.lab", OWN),
        ("https://judge.lab:8443/v1", "judge.lab", ""),
        ("https://evil.org/v1", "judge.lab", ""),
        ("http://[::1]:8000/v1", "[::1]:8000", OWN),
        ("https://judge.lab/v1", "judge.lab:notaport", ""),
    ],
)
def test_a_key_goes_to_its_owner_alone(url: str, named: str, sent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_API_KEY", NVIDIA)
    monkeypatch.setenv("REWARD_API_KEY", OWN)
    monkeypatch.setenv("REWARD_API_HOST", named)
    assert key_for(url)[1] == sent
    header = VLLMReward("model", base_url=url)._session().headers.get("Authorization")
    assert header == (f"Bearer {sent}" if sent else None)


@pytest.mark.parametrize(
    "url",
    [
        "http://evil.org\\@127.0.0.1/v1",
        "http://evil.org\\.nvidia.com/v1",
        "https://evil.org#@integrate.api.nvidia.com/v1",
        "https://evil.org?@integrate.api.nvidia.com/v1",
        "https://me@judge.lab/v1",
        "https://judge.lab/v1?x=1",
        "https://judge.lab/v1#x",
        "https://judge.lab\n.nvidia.com/v1",
        "https://judge.lab\t/v1",
        "https://judge lab/v1",
        "https://\uff4audge.lab/v1",
        "https://judge.lab:99999/v1",
        "https://",
        "http:///v1",
        "file:///etc/passwd",
        "ftp://judge.lab/v1",
        "judge.lab/v1",
        "",
        "https://[::1/v1",
    ],
)
def test_an_address_that_can_be_read_in_two_ways_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="the reward's base_url must be http:// or https://"):
        VLLMReward("model", base_url=url)


def test_a_plain_address_is_taken_as_it_is() -> None:
    for url in ("https://Judge.Lab:8443/v1", "http://[::1]:8000", "https://integrate.api.nvidia.com/v1"):
        assert checked_url(f"{url}/") == url


def logger(**options: Any) -> dict[str, Any]:
    return {"logger": [{"class_path": "lightning.pytorch.loggers.WandbLogger", **options}]}


@pytest.mark.parametrize(
    ("trainer", "option"),
    [
        (logger(dict_kwargs={"settings": {"base_url": "https://evil.org"}}), "trainer.logger.settings"),
        (logger(init_args={"settings": {"x_files_dir": "a"}}), "trainer.logger.settings"),
        (
            {"logger": {"class_path": "MLFlowLogger", "init_args": {"tracking_uri": "evil"}}},
            "trainer.logger.tracking_uri",
        ),
        ({"logger": {"class_path": "X", "init_args": {"tags": ["https://evil.org"]}}}, "trainer.logger.tags"),
        ({"callbacks": [{"class_path": "X", "init_args": {"api": {"host": "evil"}}}]}, "trainer.callbacks.api.host"),
        (
            {"callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": "s3://b/c"}}]},
            "trainer.callbacks.dirpath",
        ),
    ],
)
def test_a_config_names_no_host_for_a_logger(trainer: dict[str, Any], option: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"{option}: a config names no host"):
        check_boundaries(trainer, tmp_path)


@pytest.mark.parametrize(
    ("part", "options"),
    [
        ("logger", {"save_dir": "/tmp/elsewhere"}),
        ("logger", {"save_dir": "."}),
        ("logger", {"save_dir": "{run}/../other"}),
        ("logger", {"save_dir": "{run}", "name": "../../x"}),
        ("logger", {"save_dir": "{run}", "version": "..\\x"}),
        ("logger", {"save_dir": "{run}-2"}),
        ("logger", {"save_dir": "{link}"}),
        ("profiler", {"dirpath": "/tmp"}),
        ("profiler", {"dirpath": "{run}", "filename": "/tmp/x"}),
        ("callbacks", {"dirpath": "~/x"}),
        ("callbacks", {"dirpath": "{run}/a\nb"}),
    ],
)
def test_what_a_config_adds_writes_within_the_run_s_folder(part: str, options: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "link").symlink_to(tmp_path)
    given = {
        name: value.replace("{run}", str(run)).replace("{link}", str(run / "link")) for name, value in options.items()
    }
    with pytest.raises(ConfigurationError, match=rf"trainer.{part}.\w+ must lie in the run's folder"):
        check_boundaries({part: [{"class_path": "X", "init_args": given}]}, run)
    fine = {"save_dir": str(run / "csv"), "name": "exp/1", "monitor": "val/loss", "filename": "best-{epoch}"}
    check_boundaries({part: [{"class_path": "lightning.X", "init_args": fine}], "profiler": "simple"}, run)


def test_the_command_line_asks(config: Any, tmp_path: Path, cli: Cli) -> None:
    outside = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path / "csv")]
    assert_refused(
        cli("fit", "--config", config("SFTModule"), *outside), "trainer.logger.save_dir must lie in the run's"
    )
    assert not (tmp_path / "csv").exists()
    root = ["--trainer.default_root_dir", str(tmp_path / "a\nb")]
    assert_refused(cli("fit", "--config", config("SFTModule"), *root), "trainer.default_root_dir must be a plain path")


def bomb(levels: int = 10, aliases: int = 10) -> str:
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * aliases)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


EXPLOSIVE = {
    "aliases": bomb(),
    "list in itself": "a: &a [*a]\n",
    "mapping in itself": "a: &a {b: *a}\n",
    "deep": "a: " + "[" * 60 + "]" * 60 + "\n",
    "3,000 levels": "a: " + "[" * 3000 + "]" * 3000 + "\n",
    "many": "a: [" + "1, " * (MOST + 1) + "]\n",
}


@pytest.mark.parametrize(
    ("text", "way"), [*((text, "config") for text in EXPLOSIVE), ("aliases", "within a config"), ("aliases", "option")]
)
def test_values_that_explode_are_one_line(text: str, way: str, tmp_path: Path) -> None:
    path, outer = tmp_path / "bomb.yaml", tmp_path / "outer.yaml"
    path.write_text(EXPLOSIVE[text])
    outer.write_text("trainer: bomb.yaml\n")
    arguments = {
        "config": ["--config", str(path)],
        "within a config": ["--config", str(outer)],
        "option": ["--trainer", "{" + EXPLOSIVE[text].replace("\n", ", ") + "}"],
    }[way]
    started = time.monotonic()
    with pytest.raises(ConfigurationError, match=rf"holds more than {MOST:,} values, {DEEPEST} levels, or itself"):
        check_arguments(arguments)
    assert time.monotonic() - started < 20


def test_shared_values_and_long_configs_pass_and_huge_ones_do_not(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("a: &a {x: [1, 2]}\nb: *a\nc: {y: [*a, *a]}\n")
    check_arguments(["--config", str(path)])
    path.write_text("a: " + "x" * LARGEST)
    with pytest.raises(ConfigurationError, match="has more than 1,000,000 bytes"):
        check_arguments(["--config", str(path)])
    inner = tmp_path / "inner.yaml"
    inner.write_text(yaml.safe_dump({"group": "nvapi-" + "Ab3_" * 8}))
    path.write_text("wandb: inner.yaml\n")
    with pytest.raises(ConfigurationError, match=r"inner.yaml: group looks like a key"):
        check_arguments(["--config", str(path)])


def test_nothing_of_the_current_directory_stands_in_for_what_is_installed(tmp_path: Path) -> None:
    """``python /somewhere/cli.py`` in a folder with modules of well-known names runs none of them."""
    canary = tmp_path / "canary"
    for name in ("torch", "yaml", "json", "logging", "typing_extensions", "wandb/__init__", "commands/__init__"):
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"import os\nos.makedirs({str(canary)!r}, exist_ok=True)\n")
    (tmp_path / "own.py").write_text("def long(prompts, completions):\n    return [1.0 for _ in completions]\n")
    command = [sys.executable, str(ROOT / "cli.py"), "fit", "--config", str(ROOT / "configs" / "sft.yaml")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "PYTHONPATH": ""}
    command += ["--model.model_name", "./nowhere", "--evaluation.reward", "own.long"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 2, result.stderr
    assert "nowhere" in result.stderr
    assert not canary.exists()


def test_a_module_with_an_installed_one_s_name_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli, config: Any
) -> None:
    for name in ("requests", "json", "my_rewards"):
        (tmp_path / f"{name}.py").write_text("def polite(prompts, completions):\n    return [1.0]\n")
    path = config("SFTModule")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert shadowed("json.polite").startswith("json of the current directory has the name of an installed module")
    assert shadowed("my_rewards.polite") == shadowed("os.path") == ""
    told = "requests of the current directory has the name of an installed module"
    assert_refused(cli("fit", "--config", path, "--evaluation.reward", "requests.polite"), told)
    callback = json.dumps([{"class_path": "requests.Polite"}])
    assert_refused(cli("fit", "--config", path, "--trainer.callbacks", callback), told)


@pytest.mark.parametrize("option", ["model.model_name", "model.learning_rate", "data.batch_size", "data.task"])
def test_null_for_a_value_is_one_line(option: str, config: Any, cli: Cli) -> None:
    assert_refused(cli("fit", "--config", config("DPOModule"), f"--{option}=null"), f"{option} must not be null")


def test_null_within_a_reward_is_found_and_where_it_means_something_it_is_taken() -> None:
    reward = {"class_path": "lightning_modules.rewards.WeightedReward", "init_args": {"rewards": None, "weights": []}}
    with pytest.raises(ConfigurationError, match=r"^model.reward.rewards must not be null"):
        refuse_nulls({"model": {"class_path": "lightning_modules.RLOOModule", "init_args": {"reward": reward}}})
    refuse_nulls({"model": {"class_path": "lightning_modules.DPOModule", "init_args": {"reference_model": None}}})


def test_a_file_of_rows_is_no_config(tmp_path: Path) -> None:
    """Whatever it is called, how large it is, and what its rows say."""
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"prompt": "q", "api_key": "nvapi-" + "x" * 40}] * 20_000))
    (tmp_path / "config.yaml").write_text(f"data: {{init_args: {{dataset_name: {rows}}}}}")
    for option in ("--data.dataset_name", "--data.init_args.dataset_name", "--evaluation.dataset_name"):
        check_arguments([option, str(rows), f"{option}={rows}"])
    check_arguments(["--config", str(tmp_path / "config.yaml")])
