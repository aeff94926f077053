"""Forty wrong command lines: exit code 2, a few lines, the nearest name, and no model loaded."""

import socket
from pathlib import Path
from typing import Any

import pytest

from lightning_modules import SFTModule, base
from tests.command_line import Cli

pytestmark = pytest.mark.filterwarnings("ignore")

WRONG = [
    ("--trainer.max_epoch 1", "no option '--trainer.max_epoch'; did you mean trainer.max_epochs?"),
    ("--trainer.max_epochs many", "trainer.max_epochs must be a whole number or null, got many"),
    ("--trainer.max_epochs 1.5", "trainer.max_epochs must be a whole number or null, got 1.5"),
    ("--trainer.max_epochs", "trainer.max_epochs: expected one argument"),
    ("--model.learning_rat 1", "no option '--model.learning_rat'; did you mean model.learning_rate?"),
    ("--model.learning_rate fast", "learning_rate must be a number, got fast"),
    ("--model.learning_rate -1", "model.learning_rate must be positive, got -1"),
    ("--model.warmup_ratio 7", "model.warmup_ratio must be within 0..1, got 7"),
    ("--model.beta 0.1", "no option 'beta'; there are: compile,"),
    ("--model.schedule cosin", "got cosin; did you mean cosine?"),
    ("--model SFTModul", "got SFTModul; did you mean SFTModule?"),
    ("--model lightning_modules.SFTModul", "did you mean SFTModule?"),
    ("--model.model_name ./nowhere", "model directory ./nowhere does not exist"),
    ("--data SmolTalkDataModul", "did you mean SmolTalkDataModule?"),
    ("--data.batch_sise 4", "no option '--data.batch_sise'; did you mean data.batch_size?"),
    ("--data.batch_size 0", "data.batch_size must be at least 1, got 0"),
    ("--data.task prefs", "task must be one of 'conversations', 'preferences', 'prompts', got prefs"),
    ("--data.task prompts", "SFTModule trains on conversations, the data module yields prompts"),
    ("--data.dataset_name ./nowhere", "./nowhere does not exist; change data.dataset_name"),
    ("--data.max_length 1000", "reads at most 256 tokens, sequences may have 1000"),
    ("--evaluation.num_prompt 4", "did you mean evaluation.num_prompts?"),
    ("--evaluation.reward lightning_modules.rewards.rules.brevitty", "no reward at the import path"),
    ("--wandb.mode off", "wandb.mode must be one of 'online', 'offline', 'disabled' or null, got off"),
    ("--wandb.mode offline --wandb.project a/b", "Invalid project name 'a/b': cannot contain characters"),
    (f"--wandb.mode offline --wandb.tags [{'x' * 65}]", "Tags must be between 1 and 64 characters; change wandb.tags"),
    ("--wandb.mod offline", "did you mean wandb.mode?"),
    ("--trainer.strategy dpp", "did you mean ddp?"),
    ("--trainer.devices -3", "`devices` selected with `CPUAccelerator` should be an int > 0"),
    ("--trainer.accelerator gpuu", "invalid accelerator name: `accelerator='gpuu'`"),
    ("--trainer.precision bf8", "trainer.precision must be"),
    ("--trainer.callbacks EarlyStoping", "got EarlyStoping; did you mean EarlyStopping?"),
    ("--trainer.logger Wandb", "trainer.logger must be"),
    ("--trainer.val_check_interval 5000", "trainer.val_check_interval is 5000 batches and an epoch has 2; lower it"),
    ("--trainer.gradient_clip_val -1", "trainer.gradient_clip_val must be at least 0, got -1"),
    ("--trainer.accumulate_grad_batches 0", "trainer.accumulate_grad_batches must be at least 1, got 0"),
    ("--trainer.num_nodes 0", "trainer.num_nodes must be at least 1, got 0"),
    ("--trainer.check_val_every_n_epoch 0", "trainer.check_val_every_n_epoch must be at least 1, got 0"),
    ("--trainer.limit_val_batches -1", "invalid value -1"),
    ("--trainer.max_time never", "not a valid duration"),
    ("--seed_everything -5", "seed_everything must be within 0..4294967295, got -5"),
    ("--data.num_workers -1", "data.num_workers must not be negative, got -1"),
    ("--data.dataset_name [a,b]", "dataset_name must be text, got ['a', 'b']"),
    (
        "--data.chat_template nope",
        "no chat template 'nope'; name a file in data.chat_template, or one that ships: chatml",
    ),
    ("--checkpoint.last_every_minutes 0", "checkpoint.last_every_minutes must be positive, got 0"),
    ("--ckpt_path last --overwrite true", "--ckpt_path goes on and --overwrite true starts over: name one of the two"),
    ("--trainer.gradient_clip_algorithm norms", "Allowed algorithms: ['value', 'norm']"),
    ("--trainer.default_root_dir /proc/none", "cannot write into '/proc/none'"),
    ("--trainer nowhere.yaml", "Unable to load config 'nowhere.yaml'"),
    ("--seed_everything x", "seed_everything must be true or false or a whole number, got x"),
    ("--checkpoint.mode lowest", "`mode` can be min, max but got lowest"),
    ("--checkpoint.monitr x", "did you mean checkpoint.monitor?"),
    ("--export.dir x", "did you mean export.directory?"),
    ("--export.directory a/b", "export.directory must be a new name within the run's folder, got 'a/b'"),
    ("--ckpt_path nowhere.ckpt", "--ckpt_path nowhere.ckpt does not exist"),
    ("--ckpt_path best", "--ckpt_path best: name the checkpoint itself"),
    ("--ckpt_path README.md", "it is truncated, or no checkpoint"),
    ("--optimizer Adam", "no option '--optimizer'"),
    ("--lr 0.1", "no option '--lr'; did you mean --model.learning_rate?"),
    ("--batch-size 4", "no option '--batch-size'; did you mean --data.batch_size?"),
    ("--epochs=4", "no option '--epochs'; did you mean --trainer.max_epochs?"),
    ("--max_length 4", "no option '--max_length'; did you mean --data.max_length?"),
    ("--config dpo", "--config dpo does not exist; did you mean --config configs/dpo.yaml?"),
    ("configs/demo/sft.yaml", "fit takes its config by name: --config configs/demo/sft.yaml"),
    ("--confg x.yaml", "no option '--confg'; did you mean config?"),
    ("--config configs/sftt.yaml", "configs/sftt.yaml does not exist; did you mean configs/sft.yaml?"),
    ("--config configs", "--config configs is no file"),
    ("--config README.md", "no YAML of plain values"),
    ("--config configs/demo/dpo.yaml", "the configs contradict each other"),
    ("surplus", "no option 'surplus'"),
]


@pytest.fixture
def loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be loaded before an option is refused."""
    monkeypatch.setattr(base, "load_causal_lm", lambda *_, **__: pytest.fail("a model was loaded"))


@pytest.mark.usefixtures("loads_nothing")
@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[arguments for arguments, _ in WRONG])
def test_a_wrong_option_of_fit_is_told_in_a_few_lines(arguments: str, message: str, config: Any, cli: Cli) -> None:
    assert_told(cli("fit", "--config", config("SFTModule"), *arguments.split()), message)


@pytest.mark.usefixtures("loads_nothing")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("fti", "no command 'fti'; did you mean fit?"),
        ("fit", "fit.model; name a config (--config configs/sft.yaml)"),
        ("fit --model SFTModule", "fit needs data: name a config"),
        ("validate --model.model_nam x", "did you mean model.model_name?"),
        ("validate --ckpt_path nowhere", "--ckpt_path nowhere does not exist"),
        ("serve-reward", "serve-reward needs either --model DIR or --reward IMPORT.PATH"),
        ("serve-reward --prot 80", "did you mean port?"),
        ("serve-reward --port http", "port must be a whole number, got http"),
        ("serve-reward --reward os.system", "no reward at the import path 'os.system'"),
        ("serve-reward --port 99999 --reward x.y", "--port must be within 1..65535, got 99999"),
        ("serve-reward --reward demo.judge.judge --host 1.2.3.4.5", "cannot listen at 1.2.3.4.5:8000"),
        ("serve-reward --model ./none", "model directory ./none does not exist"),
        ("compare README.md README.md", "is named 2 times; name each run once"),
        ("compare --outpt x", "there is no option '--outpt'; did you mean output?"),
        ("inspect --config configs/sft.yaml --rowz 3", "there is no option '--rowz'; did you mean rows?"),
        ("inspect --config configs/sft.yaml --rows many", "rows must be a whole number, got many"),
        ("plan --config configs/sft.yaml --data.max_lenght 3", "did you mean data.max_length?"),
        (
            "plan --config configs/sft.yaml --data CustomDataModule --data.dataset_name rows.json",
            "the following arguments are required: data.task",
        ),
        ("plan --config sft", "--config sft does not exist; did you mean --config configs/sft.yaml?"),
        ("serve-reward --reward lightning_modules.rewards.rules.Mentions --reward.wort x", "did you mean word?"),
        ("serve-reward --reward.word x --port 8123", "'--reward.word' belongs to a reward, and none is named"),
        ("serve-reward --model ./none more", "'more' belongs to a reward"),
        ("compare nowhere", "nowhere has no config.yaml"),
    ],
)
def test_a_wrong_command_line_is_told_in_a_few_lines(arguments: str, message: str, cli: Cli) -> None:
    assert_told(cli(*arguments.split()), message)


@pytest.mark.usefixtures("loads_nothing")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: {max_epoch: 1}", "max_epoch"),
        ("model: {init_args: {learning_rat: 1}}", "learning_rat"),
        ("evaluation: [1]", "evaluation must hold options, got a list"),
        ("trainer: {max_epochs: 1", "no YAML of plain values"),
        ("nothing: 1", "nothing"),
        ("", "holds no options"),
        ("\xff", "cannot be read"),
    ],
)
def test_a_wrong_config_is_told_in_a_few_lines(text: str, message: str, config: Any, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "wrong.yaml").write_text(text, encoding="latin-1")
    assert_told(cli("fit", "--config", config("SFTModule"), "--config", str(tmp_path / "wrong.yaml")), message)


def test_a_port_in_use_is_told_in_a_line(cli: Cli) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = cli("serve-reward", "--reward", "demo.judge.judge", "--port", port)
    assert_told(result, f"cannot listen at 127.0.0.1:{port} (Address already in use); change --port or --host")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--checkpoint.monitor", "val/los"],
            "checkpoint.monitor is val/los, which no validation logs; did you mean val/",
        ),
        (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "vall/lss"],
            "EarlyStopping's monitor is vall/lss, which no validation logs; did you mean val/loss?",
        ),
        (["--checkpoint.monitor", "val/loss", "--trainer.limit_val_batches", "0"], "but there is no validation"),
    ],
)
def test_a_monitor_that_is_never_logged_is_told_before_training(
    options: list[str], message: str, config: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sanity validation has logged all that there is to monitor."""
    monkeypatch.setattr(SFTModule, "training_step", lambda *_: pytest.fail("training began"))
    result = cli("fit", "--config", config("SFTModule", evaluation={"num_prompts": 0}), *options)
    assert_told(result, message)


def test_a_run_without_a_step_exports_nothing(config: Any, tmp_path: Path, cli: Cli) -> None:
    result = cli("fit", "--config", config("SFTModule"), "--trainer.limit_train_batches", "0")
    assert result.returncode == 0
    assert not (tmp_path / "run" / "final").exists()


def test_debug_shows_where_an_error_came_from(config: Any, cli: Cli) -> None:
    result = cli("fit", "--debug", "--config", config("SFTModule"), "--data.batch_size", "0")
    assert result.returncode == 2
    assert "Traceback" in result.stderr
    assert "data.batch_size must be at least 1, got 0" in result.stderr


def assert_told(result: Any, message: str) -> None:
    assert result.returncode == 2, result.stderr
    told = result.stderr[result.stderr.index("error: ") :].strip()
    assert message in told
    assert len(told.splitlines()) <= 6
    assert "Traceback" not in result.stderr
