"""The command line: fit and validate on LightningCLI, and the tools around a run."""

import os
import select
import sys
import tomllib
import traceback
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning calls what jsonargparse 5 will drop

HELP = """usage: python cli.py COMMAND [options]

  fit           train with SFT, a reward model's loss, DPO or RLOO
                  python cli.py fit --config configs/sft.yaml
  validate      evaluate a run's final model, or the one that is named, against a reference
                  python cli.py validate --config configs/dpo.yaml
  compare       put runs side by side: a table, summary.json and report.html
                  python cli.py compare outputs/sft outputs/dpo outputs/rloo --output outputs/report
  inspect       show rows as the model meets them: what is learned, how long, what is dropped and why
                  python cli.py inspect --config configs/sft.yaml
  plan          what a run will take, before a weight is loaded: memory, steps, calls of the judge, disk
                  python cli.py plan --config configs/dpo.yaml --memory 24
  chat          talk with a model, or with two side by side
                  python cli.py chat outputs/sft outputs/dpo --reward outputs/reward/final
  push          upload a run's model or adapter to the hub, with its card; private unless told
                  python cli.py push outputs/dpo user/name
  configs       list the ready configs; configs copy NAME copies one to change it
  doctor        what this machine is good for, and what of its set-up contradicts itself
                  python cli.py doctor --processes 2
  serve-reward  serve a reward model under the protocol of NVIDIA's Nemotron API
                  python cli.py serve-reward --model outputs/reward/final --port 8000

options of fit, validate and inspect that matter most (any option of a config can stand on the command line):
  --config FILE                          a complete config; further ones overlay it (configs/trainer/ddp.yaml)
  --model.model_name NAME                hub id or directory of the model to start from
  --model.learning_rate RATE             peak learning rate
  --data.dataset_name NAME               hub id, or a directory or file of parquet or JSONL
  --data.batch_size N, --data.max_length TOKENS, --data.max_samples N
  --data.chat_template FILE              in the place of the tokenizer's own; chatml ships
  --trainer.max_epochs N, --trainer.devices N, --trainer.default_root_dir DIR
  --evaluation.num_prompts N             prompts judged at epoch end; 0 for none
  --wandb.mode online|offline|disabled   offline where nobody is logged in
  --ckpt_path last                       resume the run in this folder
  --overwrite true                       start over in a folder that holds a run
  --print_config                         show every option as it would be used, and stop

`python cli.py fit --help` says this, `fit --help-all` lists every option; other commands have their own --help.
`python cli.py --version` says which this is.
An error is one line; --debug anywhere shows where it came from. Keys come from the environment alone:
NVIDIA_API_KEY, WANDB_API_KEY, HF_TOKEN.
"""


INTERRUPTED = 130
"""128 + SIGINT, which shells take for a command that Ctrl-C ended."""
UNREAD = 141
"""128 + SIGPIPE, which shells take for a command whose reader has left."""
COMMANDS = ("fit", "validate", "compare", "serve-reward", "inspect", "plan", "chat", "push", "configs", "doctor")


def main(arguments: list[str]) -> int:
    """Run a command; what the user can mend ends with one line and exit code 2."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0
    command, *rest = arguments
    if command == "--version":
        project = tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text("utf-8"))["project"]
        print(f"{project['name']} {project['version']}")
        return 0
    if command in ("fit", "validate"):
        if "-h" in rest or "--help" in rest:
            print(HELP)
            return 0
        rest = ["--help" if argument == "--help-all" else argument for argument in rest]
    if command not in COMMANDS:
        near = get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        from core.terminal import say_error

        say_error(f"no command {command!r}; {hint}")
        return 2
    if command in ("fit", "validate"):
        from commands.first_look import check as look

        look(command, rest)
        rest = [command, *rest]
    else:
        from commands.options import check

        check(command, rest)
    say_that_it_loads(command)
    sys.argv = [sys.argv[0], *rest]  # what the parsers read, and what DDP starts its other processes with
    return run(command, debug=debug)


def say_that_it_loads(command: str) -> None:
    """A line at once, where what follows takes seconds, and a person waits who has seen nothing yet."""
    launched = any(os.environ.get(name, "0") != "0" for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID"))
    if command not in ("configs", "compare") and sys.stderr.isatty() and not launched:
        print("loading ...", file=sys.stderr, flush=True)


def start(command: str) -> None:
    """Import what a command needs, and no more, and run it."""
    module = "lightning" if command in ("fit", "validate") else command.replace("-", "_")
    import_module(f"commands.{module}").run()


def run(command: str, *, debug: bool) -> int:
    """Run a command, and turn what it raises into an exit code."""
    try:
        start(command)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as exit_:
        if isinstance(exit_.__context__, KeyboardInterrupt):  # Lightning's, before a run is under way
            return INTERRUPTED
        raise
    except Exception as error:
        if isinstance(error, BrokenPipeError) and nobody_reads():
            return UNREAD
        from core.secrets import redact
        from core.terminal import say_error
        from core.text import shown

        told = mendable(error)
        if told is None and not debug and (ended := lost_process(error)):
            say_error(ended)
            return 1
        if debug or told is None:
            sys.stderr.write(shown(redact(traceback.format_exc())))
            return 1 if told is None else 2
        say_error(str(told))
        return 2
    return 0


def nobody_reads() -> bool:
    """Whether who read standard output has left, as ``head`` does; what is still to be written then goes nowhere."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    left = bool(output.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def mendable(error: BaseException | None) -> BaseException | None:
    """The error, or the one that caused it, that names an option to change; None where it is ours to mend."""
    from core.errors import ConfigurationError

    kinds: tuple[type[BaseException], ...] = (ConfigurationError,)
    if "lightning" in sys.modules:  # which takes seconds, and raises nothing where it is not
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        kinds += (MisconfigurationException,)
    while error is not None:
        if isinstance(error, kinds) or refused_by_lightning(error):
            return error
        error = error.__cause__
    return None


def lost_process(error: BaseException) -> str:
    """What to say where the run ends here because it has ended elsewhere; empty where it has not."""
    from core.errors import ProcessError, is_of_another_process

    if isinstance(error, ProcessError):
        return str(error)
    if is_of_another_process(error):
        return f"another process of this run ended or does not answer; what it printed says why ({str(error)[:200]})"
    return ""


def refused_by_lightning(error: BaseException) -> bool:
    """Whether Lightning itself refuses a value, as it does within ``fit`` where it sees the data."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    module = "" if last is None else str(last.tb_frame.f_globals.get("__name__"))
    return isinstance(error, ValueError) and module.startswith("lightning.")


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # rewards and datasets of the user's own, behind everything that is installed
    sys.exit(main(sys.argv[1:]))
