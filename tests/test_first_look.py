"""What is told of a command line before anything is imported is what the parser would tell, and no more."""

from pathlib import Path

import pytest

from commands.configured import configured
from commands.first_look import OWN, SOURCES, flaws, names_others, options_of


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_every_option_that_the_parser_knows_is_known(command: str) -> None:
    settings = configured(["--config", "configs/demo/dpo.yaml"], command=command)
    names = {action.dest for action in settings._subcommand_parsers[command]._actions}
    assert len(names) > 100
    for name in names:
        section, _, option = name.partition(".")
        known = section in SOURCES and (option in ("", "help") or option.partition(".")[0] in options_of(section))
        assert known or name in OWN, name
    for method in ("sft", "reward", "dpo", "rloo"):
        rule = ["--model.reward", "lightning_modules.rewards.rules.brevity"] if method == "rloo" else []
        settings = configured(["--config", f"configs/demo/{method}.yaml", *rule])
        for section in ("model", "data"):
            given = settings.config["fit"][section].init_args.as_dict()
            assert set(given) <= options_of(section)
            assert not list(flaws("fit", [f"--{section}.{name}=1" for name in given]))


def test_options_of_a_class_that_is_not_of_this_suite_are_left_to_the_parser(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("model:\n  class_path: my_methods.Mine\n  init_args: {model_name: x}\n")
    assert not list(flaws("fit", ["--config", str(own), "--model.temper", "1"]))
    assert not list(flaws("fit", ["--data", "my_data.Mine", "--data.rows", "1"]))
    assert list(flaws("fit", ["--config", str(own), "--trainer.max_epoch", "1"]))
    assert list(flaws("fit", ["--config", "configs/sft.yaml", "--model.temper", "1"]))


def test_what_is_right_is_not_told() -> None:
    right = ["--config", "configs/sft.yaml", "--config=configs/trainer/ddp.yaml", "--model.lora.rank", "4", "--model"]
    right += [
        "SFTModule",
        "--data.init_args.batch_size=4",
        "--trainer.callbacks+=EarlyStopping",
        "--print_config=skip_null",
    ]
    right += [
        "--trainer.strategy.data_parallel_size",
        "2",
        "--evaluation.dataset_name",
        "prompts.yaml",
        "-c",
        "configs/sft.yaml",
    ]
    assert not list(flaws("fit", right))


def test_a_file_of_rows_names_no_class(tmp_path: Path) -> None:
    """It is not even read, as it may be large; a config is."""
    (tmp_path / "rows.json").write_text('[{"class_path": "mine.Own"}]')
    rows = str(tmp_path / "rows.json")
    assert not names_others(["--data.dataset_name", rows, f"--data.init_args.dataset_name={rows}"])
    assert names_others(["--config", rows])
