"""The options of each command but ``fit`` and ``validate``, at hand before anything large is imported."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from typing_extensions import override

from commands import first_look
from commands.explaining import explain
from core.terminal import say_error

OF_A_CONFIG = "Every option of fit stands beside them: --config FILE, --data.max_length TOKENS, ..."
OF_A_REWARD = "Options of a reward's class stand behind it: --reward my_rewards.Mentions --reward.word please"
REWARD_S = re.compile(r"--reward\.|(?!-)")
"""An option of a reward's class, or the value of one."""
MOST_ROWS = 1_000
"""Rows that ``inspect`` looks at of each split."""
IN_A_TALK = """/system TEXT     give a system's turn, and begin anew (without TEXT: none)
/reset           begin anew
/temperature X   0 for the likeliest token each time
/exit            leave; Ctrl-D too. Ctrl-C ends an answer"""
MODES = ("online", "offline", "disabled")


class Options(argparse.ArgumentParser):
    """argparse's, with errors of one line and no abbreviations."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})  # type: ignore[arg-type]

    @override
    def error(self, message: str) -> NoReturn:
        say_error(explain(message, {action.dest for action in self._actions}))
        raise SystemExit(2)


def compare() -> Options:
    """Of ``compare``."""
    parser = Options("cli.py compare", description="Put runs side by side: a table, summary.json and report.html.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs: outputs/sft outputs/dpo outputs/rloo")
    parser.add_argument("--output", type=Path, default=Path("outputs/report"), help="where the files go")
    parser.add_argument("--wandb_mode", choices=MODES, help="online where somebody is logged in, where not given")
    return parser


def inspect() -> Options:
    """Of ``inspect``."""
    told = "Rows as the model meets them; what is learned is green, a rejected answer red."
    parser = Options("cli.py inspect", description=told, epilog=OF_A_CONFIG)
    parser.add_argument("--rows", type=int, default=3, help="rows shown of each split (3)")
    parser.add_argument("--split", default="both", help="train, validation or both")
    parser.add_argument("--examined", type=int, default=MOST_ROWS, help=f"rows looked at of each split ({MOST_ROWS:,})")
    parser.add_argument("--ids", action="store_true", help="token ids too")
    parser.add_argument("--output", type=Path, help="write a page that stands alone, instead")
    return parser


def plan() -> Options:
    """Of ``plan``."""
    told = "What a run will take, before a weight is loaded: memory by part, steps, tokens, calls, disk."
    parser = Options("cli.py plan", description=told, epilog=OF_A_CONFIG)
    parser.add_argument("--memory", type=float, metavar="GB", help="of the GPU to plan for, where it is not at hand")
    parser.add_argument("--json", action="store_true", help="the figures in JSON")
    return parser


def chat() -> Options:
    """Of ``chat``."""
    told = "Talk with a model, or with two side by side; piped input is answered line by line."
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = Options("cli.py chat", description=told, epilog=IN_A_TALK, formatter_class=as_it_is)
    parser.add_argument("models", nargs="+", metavar="DIR", help="a model's directory, a run's folder, or a hub id")
    parser.add_argument("--reward", help="score each answer: a reward model's directory, or an import path")
    parser.add_argument("--system", help="the system's turn")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 for the likeliest token each time (0.7)")
    parser.add_argument("--max_completion_length", type=int, default=512, help="tokens of an answer at most (512)")
    parser.add_argument("--seed", type=int, default=42, help="of the sampling (42)")
    return parser


def push() -> Options:
    """Of ``push``."""
    parser = Options("cli.py push", description="Upload a run's model or adapter to the hub; the key is HF_TOKEN's.")
    parser.add_argument("directory", type=Path, metavar="DIR", help="a run's folder, its final/ or its adapter/")
    parser.add_argument("repo", help="user/name on the hub")
    parser.add_argument("--adapter", action="store_true", help="of a run's folder the adapter, not the merged model")
    parser.add_argument("--public", action="store_true", help="for everybody to see; private otherwise")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    return parser


def configs() -> Options:
    """Of ``configs``."""
    parser = Options("cli.py configs", description="List the ready configs, or copy one to change it.")
    actions = parser.add_subparsers(dest="action", parser_class=Options)
    copy = actions.add_parser("copy", description="Copy a config into the current directory, or to a file.")
    copy.add_argument("name", help="as it is listed: sft, demo/dpo, adapters/lora")
    copy.add_argument("target", nargs="?", type=Path, help="a file; NAME.yaml where not given")
    return parser


def doctor() -> Options:
    """Of ``doctor``."""
    parser = Options("cli.py doctor", description="What this machine is good for, and what contradicts itself.")
    parser.add_argument("--config", action="append", default=[], help="whose trainer is to fit the launcher")
    parser.add_argument("--processes", type=int, default=0, help="try an all-reduce among so many processes")
    parser.add_argument("--offline", action="store_true", help="do not try to reach W&B, the hub and the judge")
    return parser


def serve_reward() -> Options:
    """Of ``serve-reward``."""
    told = "Serve a reward under the protocol of NVIDIA's Nemotron API, until interrupted."
    parser = Options("cli.py serve-reward", description=told, epilog=OF_A_REWARD)
    parser.add_argument("--model", help="directory or hub id of a reward model")
    parser.add_argument("--reward", help="or the import path of a function or class, or all that --model.reward takes")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for every one (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (8000)")
    return parser


PARSERS: dict[str, Callable[[], Options]] = {
    parser.__name__.replace("_", "-"): parser
    for parser in (compare, inspect, plan, chat, push, configs, doctor, serve_reward)
}
"""By the command."""


def check(command: str, arguments: list[str]) -> None:
    """Say what help is asked for, or what is wrong, before anything large is imported."""
    parser = PARSERS[command]()
    _, others = parser.parse_known_args(arguments)
    if parser.epilog == OF_A_CONFIG:
        first_look.check(command, others, also={action.dest for action in parser._actions})
    elif strange := [other for other in others if parser.epilog != OF_A_REWARD or not REWARD_S.match(other)]:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
