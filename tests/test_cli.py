"""The command line as its user meets it: errors in one line before expensive work, help, and every YAML."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from commands.options import PARSERS
from tests.command_line import Cli, assert_refused
from tests.evaluation_run import read
from tests.reward_server import Asked, Reply, RewardServer, text_reply

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("method", ["SFTModule", "RewardModule", "DPOModule", "RLOOModule"])
def test_fit_leaves_the_folder_that_is_promised(method: str, config: Any, tmp_path: Path, cli: Cli) -> None:
    result = cli("fit", "--config", config(method))
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    expected = {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "final"}
    expected |= {"eval"} if method != "RewardModule" else set()
    expected |= {"tables.jsonl"} if method == "RLOOModule" else set()
    assert {path.name for path in run.iterdir()} - {"wandb"} == expected
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert (run / "final" / "model.safetensors").is_file()
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = {name for line in logged for name in line}
    assert any(name.startswith("val/") for name in names)
    assert method == "RewardModule" or "eval/win_rate" in names
    assert "Traceback" not in result.stderr
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    turn, text = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    assert turn != text
    exported = json.loads((run / "final" / "config.json").read_text())
    assert (exported["eos_token_id"], exported["pad_token_id"]) == (turn, text)
    if method != "RewardModule":  # whoever generates with it stops at either
        settings = json.loads((run / "final" / "generation_config.json").read_text())
        assert (settings["eos_token_id"], settings["pad_token_id"]) == ([turn, text], text)


def test_a_model_and_data_that_do_not_fit_are_told_in_one_line(config: Any, cli: Cli) -> None:
    result = cli("fit", "--config", config("DPOModule", data={"task": "conversations"}))
    assert_refused(result, "DPOModule trains on preferences, the data module yields conversations")


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("RLOOModule", {"model": {"samples_per_prompt": 1}}, "model.samples_per_prompt to be at least 2, got 1"),
        ("SFTModule", {"model": {"model_name": "./nowhere"}}, "model directory ./nowhere does not exist"),
        ("SFTModule", {"model": {"learning_rat": 1.0}}, "learning_rat"),
        ("SFTModule", {"data": {"dataset_name": "./nowhere"}}, "./nowhere does not exist; change data.dataset_name"),
        ("SFTModule", {"data": {"max_length": 1000}}, "reads at most 256 tokens, sequences may have 1000"),
        ("SFTModule", {"evaluation": {"reward": "os.system"}}, "no reward at the import path 'os.system'"),
        ("SFTModule", {"evaluation": {"reward": None}}, "NVIDIA_API_KEY is not set"),
        (
            "SFTModule",
            {
                "evaluation": {
                    "reward": {
                        "class_path": "lightning_modules.rewards.NemotronReward",
                        "init_args": {"base_url": "http://127.0.0.1:9/v1", "max_attempts": 1},
                    }
                }
            },
            "http://127.0.0.1:9/v1 cannot be reached",
        ),
    ],
)
def test_a_wrong_option_is_told_in_a_line_or_two(
    method: str, changes: dict[str, Any], message: str, config: Any, cli: Cli
) -> None:
    assert_refused(cli("fit", "--config", config(method, **changes)), message)


@pytest.mark.parametrize("command", sorted(PARSERS))
def test_help_and_wrong_options_of_a_command_are_told_before_anything_large_is_imported(command: str) -> None:
    code = (
        "import sys, cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit as ended: print('torch' in sys.modules, ended.code)"
    )
    asked = subprocess.run(
        [sys.executable, "-c", code, command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert asked.stdout.startswith(f"usage: cli.py {command} ")
    assert asked.stdout.endswith("False 0\n")
    told = subprocess.run(
        [sys.executable, "-c", code, command, "--no-such-option"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert told.stderr.startswith("error: ")
    assert told.stdout == "False 2\n"


def test_the_version_is_the_project_s(cli: Cli) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cli("--version").stdout == f"{project['name']} {project['version']}\n"


def test_help_names_the_commands_and_unknown_ones_are_refused(cli: Cli) -> None:
    for command in ("fit", "validate", "compare", "serve-reward"):
        assert command in cli("--help").stdout
    refused = cli("train")
    assert refused.returncode == 2
    assert "no command 'train'; the commands are fit, validate, compare, serve-reward" in refused.stderr


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if p.parent.name in ("configs", "demo")], ids=lambda p: str(p.relative_to(ROOT))
)
def test_every_config_is_complete_and_says_how_to_run_it(path: Path, cli: Cli) -> None:
    """Parsed by the real parser, which checks every key and type; nothing is downloaded or loaded."""
    relative = path.relative_to(ROOT).as_posix()
    assert path.read_text().startswith(f"# python cli.py fit --config {relative}")
    result = cli("fit", "--config", relative, "--config", "configs/trainer/ddp.yaml", "--print_config")
    assert result.returncode == 0, result.stderr
    printed = yaml.safe_load(result.stdout)
    assert printed["trainer"]["strategy"] == "ddp"
    evaluates, trains = printed["evaluation"]["reward"], printed["model"]["init_args"].get("reward")
    assert trains is None or evaluates != trains


@pytest.mark.parametrize("method", ["sft", "reward", "dpo", "rloo"])
@pytest.mark.parametrize("overlay", sorted((ROOT / "configs" / "adapters").glob("*.yaml")), ids=lambda p: p.stem)
def test_an_adapter_s_config_changes_the_model_s_part_alone(method: str, overlay: Path, cli: Cli) -> None:
    pytest.importorskip("peft", reason="the extra [lora] is not installed")
    relative = overlay.relative_to(ROOT).as_posix()
    assert overlay.read_text().startswith(f"# python cli.py fit --config configs/sft.yaml --config {relative}")
    printed = []
    for overlays in ([], ["--config", relative]):
        result = cli("fit", "--config", f"configs/{method}.yaml", *overlays, "--print_config")
        assert result.returncode == 0, result.stderr
        printed.append(yaml.safe_load(result.stdout))
    plain, adapted = (content.pop("model") for content in printed)
    assert printed[0] == printed[1]
    assert plain["class_path"] == adapted["class_path"]
    changed = {name for name, value in adapted["init_args"].items() if plain["init_args"].get(name) != value}
    assert changed <= {"lora", "learning_rate", "quantization"}
    assert adapted["init_args"]["lora"]["rank"] == 16


def test_validate_takes_any_model_and_a_file_of_prompts(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    """No config, no method, no training data; the folder it leaves is one that ``compare`` reads."""
    lines = [{"prompt": "one"}, {"prompt": "two", "source": "numbers"}, {"prompt": "three"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {
        "--model.model_name": str(tiny_model_dir),
        "--trainer.accelerator": "cpu",
        "--trainer.default_root_dir": str(tmp_path / "run"),
        "--evaluation.reference_model": str(tiny_model_dir),
        "--evaluation.dataset_name": str(tmp_path / "prompts.jsonl"),
        "--evaluation.num_prompts": "2",
        "--evaluation.max_completion_length": "4",
        "--evaluation.reward": "lightning_modules.rewards.rules.brevity",
    }
    arguments = [part for option in options.items() for part in option]
    result = cli("validate", *arguments)
    assert result.returncode == 0, result.stderr
    _, pairs = read(tmp_path / "run" / "eval" / "final")
    assert [(p["prompt"][-1]["content"], p["source"]) for p in pairs] == [("one", None), ("two", "numbers")]
    assert all(p["outcome"] == "tie" for p in pairs)
    compared = cli("compare", str(tmp_path / "run"), "--output", str(tmp_path / "report"))
    assert compared.returncode == 0, compared.stderr
    told = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert told["packages"]["torch"]
    assert told["data"] == {}
    assert len(told["model"]) == 64


def test_validate_evaluates_every_checkpoint_of_a_folder(config: Any, tmp_path: Path, cli: Cli) -> None:
    path = config("SFTModule", trainer={"max_epochs": 2}, checkpoint={"save_top_k": -1, "filename": "{epoch}"})
    changes = ["--model.learning_rate", "0.05", "--checkpoint.save_last", "false"]
    assert cli("fit", "--config", path, *changes).returncode == 0
    during = [read(tmp_path / "run" / "eval" / f"epoch={epoch}") for epoch in range(2)]
    assert [p["completion"] for p in during[0][1]] != [p["completion"] for p in during[1][1]]
    reference = yaml.safe_load(Path(path).read_text())["model"]["init_args"]["model_name"]
    checkpoints = str(tmp_path / "run" / "checkpoints")
    root = ["--trainer.default_root_dir", str(tmp_path / "again"), "--evaluation.reference_model", reference]
    result = cli("validate", "--config", path, *root, "--ckpt_path", checkpoints)
    assert result.returncode == 0, result.stderr
    for epoch in range(2):
        metrics, pairs = read(tmp_path / "again" / "eval" / f"epoch={epoch}")
        assert pairs == during[epoch][1]
        assert metrics["win_rate"] == during[epoch][0]["win_rate"]
    refused = cli("validate", "--config", path, *root, "--ckpt_path", str(tmp_path / "nowhere"))
    assert_refused(refused, "nowhere does not exist; name a checkpoint, or last")


@pytest.mark.slow
def test_a_planted_key_is_in_no_file_and_no_stream(config: Any, tmp_path: Path, server: RewardServer) -> None:
    """With W&B's records, a judge that echoes the key in its refusals, and every other file of the run."""
    key = "nvapi-planted-canary-0123456789"

    def echo(asked: Asked) -> Reply:
        text = asked.body["messages"][-1]["content"]
        assert asked.headers["Authorization"] == f"Bearer {key}"
        probe = "one more than" in asked.body["messages"][0]["content"]
        if not probe and len(text) % 2:
            return Reply(f'{{"detail": "bad key {key}"}}'.encode(), status=422)
        return text_reply(f"reward:{-9.0 if text == 'No idea.' else 1.0}")

    server.respond = echo
    reward = {
        "class_path": "lightning_modules.rewards.NemotronReward",
        "init_args": {"base_url": server.url, "requests_per_minute": 0},
    }
    path = config("SFTModule", evaluation={"reward": reward, "temperature": 1.5})
    environment = {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    environment |= {"REWARD_API_KEY": key, "REWARD_API_HOST": f"127.0.0.1:{server.server_port}"}
    command = [sys.executable, "cli.py", "fit", "--config", path]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert len(server.asked) > 2
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"config.yaml", "metrics.jsonl", "metrics.json", "evaluation.sqlite"} <= {file.name for file in files}
    assert any(file.suffix == ".wandb" for file in files)
    assert [file for file in files if key.encode() in file.read_bytes()] == []
    assert key not in result.stdout + result.stderr
