"""Hostile files and options: each is refused, and nothing of it runs."""

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from callbacks.checkpoints.checkpoint_io import RESUMABLE, write_checkpoint
from callbacks.checkpoints.sharded_files import IndexUnpickler
from core.imports import is_allowed, own_modules
from core.secrets import redact, secret_in
from tests.command_line import Cli, assert_refused

pytestmark = pytest.mark.filterwarnings("ignore")
KEYS = ["nvapi-" + "Ab3_" * 12, "hf_" + "Ab3Z" * 9, "0123456789abcdef" * 2 + "01234567", "sk-" + "Ab3Z" * 9]


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def in_checkpoint(name: str, content: dict[str, Any], run: Path) -> None:
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.save(content, run / "checkpoints" / name)


def hyper_parameters(run: Path, canary: Path) -> list[str]:
    """A class to build, named in a checkpoint as Lightning's own command line would believe it."""
    named = {
        "_class_path": "os.mkdir",
        "path": str(canary),
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
    }
    in_checkpoint("last.ckpt", {**{name: {} for name in RESUMABLE}, "hyper_parameters": named}, run)
    return ["--ckpt_path", "last"]


def malicious_last(run: Path, canary: Path) -> list[str]:
    in_checkpoint("last.ckpt", {"state_dict": Payload(canary), "loops": {}, "optimizer_states": []}, run)
    return ["--ckpt_path", "last"]


def malicious_file(run: Path, canary: Path) -> list[str]:
    in_checkpoint("x.ckpt", {"state_dict": Payload(canary)}, run)
    return ["--ckpt_path", str(run / "checkpoints" / "x.ckpt")]


def bare_pickle(run: Path, canary: Path) -> list[str]:
    run.mkdir()
    (run / "x.ckpt").write_bytes(pickle.dumps(Payload(canary)))
    return ["--ckpt_path", str(run / "x.ckpt")]


def remote_checkpoint(run: Path, canary: Path) -> list[str]:
    return ["--ckpt_path", "http://127.0.0.1:9/last.ckpt"]


def unsafe_loading(run: Path, canary: Path) -> list[str]:
    return [*malicious_file(run, canary), "--weights_only", "false"]


def callable_option(run: Path, canary: Path) -> list[str]:
    callback = {"class_path": "LambdaCallback", "init_args": {"on_fit_start": "os.system"}}
    return ["--trainer.callbacks", json.dumps([callback])]


def standard_class(run: Path, canary: Path) -> list[str]:
    popen = {"class_path": "subprocess.Popen", "init_args": {"args": ["mkdir", str(canary)]}}
    return ["--trainer.callbacks", json.dumps([popen])]


def installed_class(run: Path, canary: Path) -> list[str]:
    return ["--trainer.logger", json.dumps({"class_path": "transformers.utils.hub.PushInProgress"})]


def reexported(run: Path, canary: Path) -> list[str]:
    """``os`` as an attribute of an allowed module."""
    return ["--evaluation.reward", "lightning.pytorch.callbacks.model_checkpoint.os.system"]


def reward_import(run: Path, canary: Path) -> list[str]:
    return ["--evaluation.reward", "this.antigravity"]


def model_class(run: Path, canary: Path) -> list[str]:
    return ["--model", json.dumps({"class_path": "os.mkdir", "init_args": {"path": str(canary)}})]


def python_tag(run: Path, canary: Path) -> list[str]:
    path = canary.parent / "tag.yaml"
    path.write_text(f"trainer: !!python/object/apply:os.mkdir ['{canary}']\n")
    return ["--config", str(path)]


def python_tag_in_an_option(run: Path, canary: Path) -> list[str]:
    return ["--trainer.max_epochs", f"!!python/object/apply:os.mkdir ['{canary}']"]


def config_from_a_url(run: Path, canary: Path) -> list[str]:
    return ["--config", "http://127.0.0.1:9/config.yaml"]


def config_from_another_file_system(run: Path, canary: Path) -> list[str]:
    return ["--trainer", f"local://{canary.parent}/trainer.yaml"]


def trusted_code(run: Path, canary: Path) -> list[str]:
    return ["--model.trust_remote_code", "true"]


HOSTILE: list[tuple[Callable[[Path, Path], list[str]], str]] = [
    (malicious_last, "none of the 1 checkpoints"),
    (malicious_file, "something else than tensors"),
    (bare_pickle, "no checkpoint"),
    (remote_checkpoint, "does not exist"),
    (unsafe_loading, "weights_only"),
    (callable_option, "os.system is nothing that a config may name"),
    (standard_class, "subprocess.Popen is nothing that a config may name"),
    (installed_class, "transformers.utils.hub.PushInProgress is nothing that a config may name"),
    (reexported, "no reward at the import path"),
    (reward_import, "no reward at the import path"),
    (model_class, "os.mkdir is nothing that a config may name"),
    (python_tag, "no YAML of plain values"),
    (python_tag_in_an_option, "trainer.max_epochs"),
    (config_from_a_url, "is a URL"),
    (config_from_another_file_system, "trainer"),
    (trusted_code, "trust_remote_code"),
]


@pytest.mark.parametrize(("hostile", "message"), HOSTILE, ids=[hostile.__name__ for hostile, _ in HOSTILE])
def test_hostile_options_are_refused_and_do_nothing(
    hostile: Callable[[Path, Path], list[str]],
    message: str,
    config: Any,
    canary: Path,
    tmp_path: Path,
    cli: Cli,
) -> None:
    arguments = hostile(tmp_path / "run", canary)
    assert_refused(cli("fit", "--config", config("SFTModule"), *arguments), message)
    assert not canary.exists()


def test_a_class_named_in_a_checkpoint_is_not_built(config: Any, canary: Path, tmp_path: Path, cli: Cli) -> None:
    """Nor do its values become the run's options; what is wrong with the file is told instead."""
    arguments = hyper_parameters(tmp_path / "run", canary)
    result = cli("fit", "--config", config("SFTModule"), *arguments)
    assert result.returncode != 0
    assert not canary.exists()
    assert "os.mkdir" not in result.stderr


def copy_of(model: Path, target: Path) -> Path:
    target.mkdir()
    for file in model.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def pickled_weights(model: Path, canary: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Payload(canary)}, model / "pytorch_model.bin")


def own_code(model: Path, canary: Path) -> None:
    settings = json.loads((model / "config.json").read_text())
    settings |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (model / "config.json").write_text(json.dumps(settings))
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")


def tokenizer_code(model: Path, canary: Path) -> None:
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "T"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    (model / "tokenizer.json").unlink()


def escaping_template(model: Path, canary: Path) -> None:
    escape = "{{ cycler.__init__.__globals__.os.mkdir('" + str(canary) + "') }}"
    (model / "chat_template.jinja").write_text(escape + "{% for m in messages %}{{ m.content }}{% endfor %}")


@pytest.mark.parametrize("spoil", [pickled_weights, own_code, tokenizer_code, escaping_template])
def test_a_hostile_model_directory_runs_nothing(
    spoil: Callable[[Path, Path], None],
    config: Any,
    canary: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    cli: Cli,
) -> None:
    model = copy_of(tiny_model_dir, tmp_path / "model")
    spoil(model, canary)
    result = cli("fit", "--config", config("SFTModule", model={"model_name": str(model)}))
    assert not canary.exists()
    assert result.returncode != 0, result.stderr


def test_a_dataset_s_script_is_not_run(config: Any, canary: Path, data: Path, tmp_path: Path, cli: Cli) -> None:
    folder = copy_of(data, tmp_path / "rows")
    (folder / "rows.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    changes = {"max_samples": 4, "dataset_name": str(folder)}
    result = cli("fit", "--config", config("SFTModule", data=changes, evaluation={"num_prompts": 0}))
    assert result.returncode == 0, result.stderr
    assert not canary.exists()


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped-export"])
def test_a_name_never_leads_out_of_the_run_s_folder(name: str, config: Any, tmp_path: Path, cli: Cli) -> None:
    assert_refused(cli("fit", "--config", config("SFTModule"), "--export.directory", name), "export.directory")


def test_only_the_user_s_own_modules_join_the_listed_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without ``__init__.py``, such as a downloaded model's, and a file named like Python's own, do not."""
    (tmp_path / "my_rewards.py").touch()
    (tmp_path / "os.py").touch()
    (tmp_path / "subprocess.py").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").touch()
    (tmp_path / "downloaded").mkdir()
    (tmp_path / "downloaded" / "evil.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert own_modules(tmp_path) == ["mine", "my_rewards"]
    assert is_allowed("my_rewards.polite")
    assert is_allowed("lightning_modules.rewards.rules.brevity")
    for path in (
        "os.system",
        "subprocess.run",
        "downloaded.evil.f",
        "my_rewardsx.f",
        "transformers.pipeline",
        "numpy.f",
    ):
        assert not is_allowed(path)


@pytest.mark.parametrize("key", KEYS)
def test_a_key_among_the_options_is_refused_without_repeating_it(
    key: str,
    config: Any,
    tmp_path: Path,
    cli: Cli,
) -> None:
    path = config("SFTModule")
    planted = tmp_path / "key.yaml"
    planted.write_text(yaml.safe_dump({"wandb": {"group": key}}))
    for arguments in (["--wandb.group", key], [f"--wandb.group={key}"], ["--config", str(planted)]):
        result = cli("fit", "--config", path, *arguments)
        assert_refused(result, "keys come from the environment alone")
        assert key not in result.stdout + result.stderr


@pytest.mark.parametrize("option", ["model.api_key", "wandb.api_key", "evaluation.token", "model.hf_token"])
def test_an_option_that_names_a_key_is_refused_whatever_its_value(option: str, config: Any, cli: Cli) -> None:
    result = cli("fit", "--config", config("SFTModule"), f"--{option}", "hunter2hunter2")
    assert_refused(result, f"{option} names a key; keys come from the environment alone")
    assert "hunter2" not in result.stderr


@pytest.mark.parametrize(
    "url", ["https://me:hunter2@host/v1", "https://host/v1?api_key=hunter2", "https://host/v1?a=b&key=hunter2"]
)
def test_a_url_with_a_secret_is_refused_and_redacted(url: str, config: Any, cli: Cli) -> None:
    reward = {"class_path": "lightning_modules.rewards.NemotronReward", "init_args": {"base_url": url}}
    result = cli("fit", "--config", config("SFTModule", evaluation={"reward": reward}))
    assert_refused(result, "is a URL with a password or key in it")
    assert "hunter2" not in result.stderr
    assert "hunter2" not in redact(f"cannot reach {url} today")


@pytest.mark.parametrize(
    "key",
    [
        *KEYS[:2],
        "ghp_" + "Ab3Z" * 9,
        "gho_" + "Ab3Z" * 9,
        "github_pat_" + "Ab3_" * 9,
        "glpat-" + "Ab3-" * 5,
        "AKIA" + "ABC3" * 4,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
    ],
)
def test_keys_of_every_known_form_are_told_wherever_they_stand(key: str) -> None:
    assert secret_in({"a": [{"b": f"see {key} there"}]}) == "a.b looks like a key"
    assert redact(f"refused: {key}, {key}") == "refused: ***, ***"
    assert redact(f"cannot reach https://{key}@host/v1") == "cannot reach https://***@host/v1"


def test_a_user_in_a_url_may_be_a_key() -> None:
    url = "https://0123token4567@judge.lab/v1"
    assert secret_in({"base_url": url}) == "base_url is a URL with a password or key in it"
    assert redact(f"cannot reach {url}") == "cannot reach https://***@judge.lab/v1"


def test_shared_options_are_read_once() -> None:
    shared: list[Any] = ["x"]
    for _ in range(60):
        shared = [shared, shared]
    assert secret_in({"a": shared}) is None
    shared.append(shared)
    assert secret_in({"a": shared, "b": KEYS[0]}) == "b looks like a key"


def test_what_only_resembles_a_key_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    harmless = {
        "model_name": f"/models/snapshots/{commit}/",
        "max_completion_length": 5,
        "tokenizer": "gpt2",
        "base_url": "http://127.0.0.1:8399/v1?version=2",
        "monitor": "val/token_accuracy",
    }
    assert secret_in(harmless) is None
    monkeypatch.setenv("NVIDIA_API_KEY", "an-unusual-key")
    assert redact("refused: an-unusual-key at http://host/v1") == "refused: *** at http://host/v1"
    assert redact("an-unusual-key, an-unusual-key") == "***, ***"


def test_a_checkpoint_of_another_run_names_both_values(config: Any, tmp_path: Path, cli: Cli) -> None:
    path = config("SFTModule", evaluation={"num_prompts": 0})
    assert cli("fit", "--config", path).returncode == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)
    again = ["--config", path, "--ckpt_path", "last"]
    refused = cli("fit", *again, "--model.learning_rate", "0.25")
    assert_refused(refused, "is of a run with model.learning_rate 1e-05, this one asks for 0.25")
    other = cli("fit", "--config", config("DPOModule"), "--ckpt_path", str(last))
    assert_refused(
        other, "model.class_path 'lightning_modules.SFTModule', this one asks for 'lightning_modules.DPOModule'"
    )
    assert cli("fit", *again, "--trainer.max_epochs", "2", "--data.num_workers", "0").returncode == 0
    write_checkpoint({**saved, "run_options": {}}, last)
    assert cli("fit", *again, "--trainer.max_epochs", "3").returncode == 0


def test_a_reward_and_a_dataset_of_the_user_s_own_are_found(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    (tmp_path / "own_work_of_this_test.py").write_text(
        "from datamodules import UltraFeedbackDataModule\n"
        "class Mine(UltraFeedbackDataModule):\n    pass\n"
        "def polite(prompts, completions):\n    return [float(len(text)) for text in completions]\n"
    )
    path = config("SFTModule", evaluation={"reward": "own_work_of_this_test.polite"})
    content = yaml.safe_load(Path(path).read_text())
    content["data"]["class_path"] = "own_work_of_this_test.Mine"
    Path(path).write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    result = cli("fit", "--config", path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.distributed.checkpoint.filesystem", "threading.Thread"),
        ("torch.distributed.checkpoint.planner", "io.BytesIO"),
        ("torch.distributed.checkpoint._experimental.checkpoint_reader", "os.PathLike"),
        ("torch.utils.collect_env", "subprocess.Popen"),
        ("torch", "serialization.os.mkdir"),
        ("os", "mkdir"),
    ],
)
def test_an_index_that_names_something_else_builds_nothing(module: str, name: str) -> None:
    """Dotted names lead from a listed module to whatever it has imported."""
    index = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)) + b"\x93."
    with pytest.raises((pickle.UnpicklingError, ModuleNotFoundError, AttributeError)) as caught:
        IndexUnpickler(io.BytesIO(index)).load()
    if isinstance(caught.value, pickle.UnpicklingError):
        assert "is no part of an index" in str(caught.value)
    else:
        pytest.fail(f"{module} has no {name}, so this proves nothing")


def test_a_run_of_another_precision_is_not_gone_on_with(config: Any, tmp_path: Path, cli: Cli) -> None:
    path = config("SFTModule", evaluation={"num_prompts": 0})
    assert cli("fit", "--config", path).returncode == 0
    refused = cli("fit", "--config", path, "--ckpt_path", "last", "--trainer.precision", "bf16-mixed")
    assert_refused(refused, "this one asks for 'bf16-mixed'")


def test_a_parser_s_error_that_echoes_a_key_does_not_show_it(
    config: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "an-unusual-key-of-no-form"
    monkeypatch.setenv("NVIDIA_API_KEY", key)
    result = cli("fit", "--config", config("SFTModule"), f"--trainer.max_epochs={key}", f"--trainer.{key}=1")
    assert result.returncode == 2
    assert "***" in result.stderr
    assert key not in result.stderr
