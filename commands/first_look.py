"""What is wrong with a command line that takes a config's options, seen before anything large is imported.

Parsing needs the classes, and with them torch: seconds. The names of their options are in the sources, which are read
here and not imported. Whatever is not known to be wrong is left to the parser.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from commands.explaining import unknown
from core.secrets import secret_in
from core.terminal import say_error

ROOT = Path(__file__).parents[1]
LIGHTNING = {"trainer": ("pytorch/trainer/trainer.py",), "checkpoint": ("pytorch/callbacks/model_checkpoint.py",)}
SOURCES = {
    "model": ("lightning_modules/*.py",),
    "data": ("datamodules/*.py",),
    "checkpoint": ("callbacks/checkpoints/boundary_checkpoint.py",),
    "export": ("callbacks/hugging_face_export.py",),
    "health": ("callbacks/training_health.py",),
    "evaluation": ("callbacks/nemotron_evaluation.py",),
    "wandb": ("callbacks/logging/tracking.py",),
    "trainer": (),
}
"""Where each section's options are defined; those of Lightning's own classes beside them."""
OWN = {
    "config",
    "seed_everything",
    "ckpt_path",
    "overwrite",
    "launch_timeout_s",
    "print_config",
    "verbose",
    "help",
    "debug",
}
OF_CLASSES = {"class_path", "init_args", "dict_kwargs", "help"}
ELSEWHERE = {
    "lr": "model.learning_rate",
    "epochs": "trainer.max_epochs",
    "num_train_epochs": "trainer.max_epochs",
    "num_epochs": "trainer.max_epochs",
    "steps": "trainer.max_steps",
    "output_dir": "trainer.default_root_dir",
    "out": "trainer.default_root_dir",
    "model_name_or_path": "model.model_name",
    "per_device_train_batch_size": "data.batch_size",
    "bs": "data.batch_size",
    "dataset": "data.dataset_name",
    "max_seq_length": "data.max_length",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "max_grad_norm": "trainer.gradient_clip_val",
    "gpus": "trainer.devices",
    "num_gpus": "trainer.devices",
    "nodes": "trainer.num_nodes",
    "seed": "seed_everything",
    "resume": "ckpt_path last",
    "resume_from_checkpoint": "ckpt_path",
    "lora_r": "model.lora.rank",
    "lora_rank": "model.lora.rank",
    "bf16": "trainer.precision bf16-mixed",
    "fp16": "trainer.precision 16-mixed",
}
"""What other trainers call an option, or what one would."""


def check(command: str, arguments: list[str], *, also: Iterable[str] = ()) -> None:
    """Say what is wrong in a line and end with exit code 2, where something is known to be.

    Args:
        command: Which takes the options of a config.
        arguments: Behind it.
        also: Options that it has beside them, to be named where one is misspelt.
    """
    flaw = next(flaws(command, arguments, also=also), None)
    if flaw is not None:
        say_error(flaw)
        raise SystemExit(2)


def flaws(command: str, arguments: list[str], *, also: Iterable[str] = ()) -> Iterator[str]:
    """What is known to be wrong, in the order of the arguments."""
    foreign = names_others(arguments)
    for argument, before in zip(arguments, ["", *arguments], strict=False):
        name, equals, _ = argument.lstrip("-").partition("=")
        if argument.startswith("--") and secret_in({name: "any value"}) is None:  # else the parser refuses it
            yield from flaws_of_option(argument, name, foreign=foreign, also=also)
        elif argument.endswith((".yaml", ".yml")) and (not before.startswith("-") or "=" in before):
            yield f"{command} takes its config by name: --config {argument}"
        if before in ("--config", "-c") or (equals and name == "config"):
            yield from flaws_of_config(argument.partition("=")[2] if equals and name == "config" else argument)


def flaws_of_config(name: str) -> Iterator[str]:
    """What is wrong with a config's name."""
    ready = Path("configs") / f"{name.removesuffix('.yaml')}.yaml"
    if not Path(name).exists() and ready.is_file():
        yield f"--config {name} does not exist; did you mean --config {ready}?"


def flaws_of_option(argument: str, name: str, *, foreign: bool, also: Iterable[str] = ()) -> Iterator[str]:
    """What is wrong with an option's name.

    Args:
        argument: As it was given.
        name: The same without dashes and value.
        foreign: Whether a model or a data module is not of this suite, with options that are not known here.
        also: Options beside those of a config.
    """
    section, _, rest = name.partition(".")
    option = rest.removeprefix("init_args.").partition(".")[0].rstrip("+")
    if section in SOURCES:
        if not rest or option in OF_CLASSES or option in options_of(section):
            return
        if not (foreign and section in ("model", "data")):
            yield unknown(argument, [f"{section}.{known}" for known in options_of(section)])
    elif section not in OWN and name.partition(".")[0] not in OWN:
        plain = name.replace("-", "_").lower()
        if there := ELSEWHERE.get(plain) or place(plain):
            yield f"there is no option {argument.partition('=')[0]!r}; did you mean --{there}?"
        else:
            every = [f"{section}.{known}" for section in SOURCES for known in options_of(section)]
            yield unknown(argument, [*OWN, *also, *SOURCES, *every])


def place(option: str) -> str:
    """The section that has an option, and its name; empty where none has it."""
    return next((f"{section}.{option}" for section in SOURCES if option in options_of(section)), "")


def names_others(arguments: Iterable[str]) -> bool:
    """Whether a class that is not of this suite is named, on the command line or in a config."""
    texts = list(arguments)
    for option, argument in zip(["", *texts], list(texts), strict=False):
        if "dataset_name" in option + argument:
            continue  # a file of rows, perhaps a large one
        file = Path(argument.rpartition("=")[2])
        if file.suffix in (".yaml", ".yml", ".json") and file.is_file():
            texts += re.findall(r"class_path[\"']?\s*:\s*[\"']?([\w.]+)", file.read_text("utf-8", errors="replace"))
    classes = [text.rpartition("=")[2] for text in texts]
    paths = [text for text in classes if re.fullmatch(r"[A-Za-z_][\w.]*\.[A-Z]\w*", text)]
    return any(
        not path.startswith(("lightning_modules.", "datamodules.", "callbacks.", "lightning.")) for path in paths
    )


@cache
def options_of(section: str) -> frozenset[str]:
    """The names of a section's options: what its classes take when they are made."""
    files = [file for pattern in SOURCES[section] for file in ROOT.glob(pattern)]
    found = find_spec("lightning")
    place = Path(next(iter(found.submodule_search_locations or []))) if found else ROOT
    files += [place / file for file in LIGHTNING.get(section, ())]
    return frozenset(name for file in files for name in parameters_in(file))


def parameters_in(file: Path) -> Iterator[str]:
    """The parameters of every ``__init__`` of a file."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            yield from (argument.arg for argument in (*node.args.args, *node.args.kwonlyargs) if argument.arg != "self")
