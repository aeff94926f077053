"""Runs that are killed at random moments and resumed by the same command, against the same run left alone.

python -m tests.kills --kills 20 --methods SFTModule RLOOModule
python -m tests.kills --kills 20 --ranks 2 [--sharded]

Each run is killed once to three times with SIGKILL, then left to end. Its final weights, its log and its model card
must be those of the uninterrupted run, byte for byte. The processes are forked from one that has imported everything.
Of two ranks one is killed, and the rest a moment later, as launchers do; or the whole job at once.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from tqdm import tqdm

from cli import main as cli_main
from tests.conftest import make_tiny_model
from tests.evaluation_run import write_rows
from tests.forked import ended, start

METHODS = ("SFTModule", "RewardModule", "DPOModule", "RLOOModule")
SIDES = {"chosen": "yes", "rejected": "no way"}
SHARDED = {"class_path": "callbacks.checkpoints.sharded_strategy.ShardedStrategy"}


class Outcome(NamedTuple):
    """What became of the runs of a method."""

    runs: int
    kills: int
    equal: int
    different: list[str]
    """What differed, run by run."""


def make_material(directory: Path) -> None:
    """Rows, and a small model with dropout, so that every step draws random numbers."""
    make_tiny_model(directory / "model", attention_dropout=0.1)
    for split in ("train", "test"):
        write_rows(directory / f"{split}.jsonl", 11)
    for split in ("train_prefs", "test_prefs"):
        rows = [
            {"prompt": f"q{i}", **{side: talk(f"q{i}", f"{answer} {i}") for side, answer in SIDES.items()}}
            for i in range(11)
        ]
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def talk(question: str, answer: str) -> list[dict[str, str]]:
    """A question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def command(
    material: Path,
    run: Path,
    method: str,
    *,
    workers: int = 0,
    epochs: int = 2,
    ranks: int = 1,
    rank: int = 0,
    mixture: bool = False,
    sharded: bool = False,
    accelerator: str = "cpu",
) -> list[str]:
    """The same command for the first start and for every later one; ``rank`` is LoRA's, 0 for all weights."""
    task = {"SFTModule": "conversations", "RLOOModule": "prompts"}.get(method, "preferences")
    model: dict[str, Any] = {"model_name": str(material / "model"), "learning_rate": 1e-2}
    if rank:
        model["lora"] = {"rank": rank}
    if method == "RLOOModule":
        reward = "lightning_modules.rewards.rules.brevity"
        model |= {"reward": reward, "max_completion_length": 5, "samples_per_prompt": 2, "updates_per_rollout": 2}
    content = {
        "export": {},
        "trainer": {
            "default_root_dir": str(run),
            "accelerator": accelerator,
            **({"deterministic": True, "precision": "bf16-mixed"} if accelerator == "gpu" else {}),
            "devices": ranks,
            **({"strategy": SHARDED if sharded else "ddp"} if ranks > 1 or sharded else {}),
            "max_epochs": epochs,
            "accumulate_grad_batches": 2,
            "val_check_interval": 0.5,
            "log_every_n_steps": 1,
            "enable_model_summary": False,
            "enable_progress_bar": False,
        },
        "model": {"class_path": f"lightning_modules.{method}", "init_args": model},
        "data": {
            "class_path": "datamodules.UltraFeedbackDataModule",
            "init_args": {
                "dataset_name": str(material),
                "task": task,
                "batch_size": 2,
                "max_length": 64,
                "num_workers": workers,
            },
        },
        "evaluation": {
            "reward": "lightning_modules.rewards.rules.brevity",
            "dataset_name": str(material),
            "num_prompts": 0 if method == "RewardModule" else 3,
            "max_completion_length": 4,
        },
        "checkpoint": {"monitor": None, "every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"},
    }
    if method != "RLOOModule":
        content["data"]["init_args"]["tokens_per_batch"] = 96  # type: ignore[index]
    if mixture:
        content["data"] = mixed(content["data"])  # type: ignore[arg-type]
        content["trainer"]["max_epochs"] = epochs + 1  # type: ignore[index]
    file = run.parent / f"{run.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content))
    return ["fit", "--config", str(file), "--ckpt_path", "last"]


def mixed(data: dict[str, Any]) -> dict[str, Any]:
    """A mixture of the rows and of some of them, at 0.7 to 0.3."""
    options = dict(data["init_args"])
    rows = {name: options.pop(name) for name in ("dataset_name", "task")}
    parts = {"all": {**data, "init_args": rows}, "some": {**data, "init_args": {**rows, "max_samples": 5}}}
    weights = {"all": 0.7, "some": 0.3}
    return {"class_path": "datamodules.MixtureDataModule", "init_args": {"parts": parts, "weights": weights, **options}}


def kill(processes: list[Any], rng: random.Random) -> None:
    """Kill one of the ranks and the others a moment later, or all at once; with the loaders that they started."""
    first = rng.choice(processes)
    os.killpg(first.pid, signal.SIGKILL)
    first.join()
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0, 2))
    for process in processes:
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def trial(
    material: Path, folder: Path, method: str, rng: random.Random, *, kills: int, ranks: int, **options: Any
) -> int:
    """A run that is killed so many times, if it lives so long, and then left alone; how many times it was."""
    arguments = command(material, folder / "run", method, ranks=ranks, **options)
    killed = 0
    for _ in range(kills):
        processes = start(lambda: cli_main(arguments), ranks=ranks, log=folder / "log.txt")
        processes[0].join(rng.uniform(0.5, options_seconds(folder)))
        if any(process.exitcode is not None for process in processes):
            ended(processes)
            break
        kill(processes, rng)
        killed += 1
    codes = ended(start(lambda: cli_main(arguments), ranks=ranks, log=folder / "log.txt"))
    if any(code != 0 for code in codes):
        told = (folder / "log.txt").read_text()[-8000:]  # all of a process that hung and said where
        raise RuntimeError(f"{method} in {folder} ended with {codes}: {told}")
    return killed


def options_seconds(folder: Path) -> float:
    """How long the uninterrupted run took."""
    return float((folder.parent / "alone" / "seconds").read_text())


def difference(alone: Path, killed: Path) -> str:
    """The first of weights and log that differs; nothing where all are equal."""
    names = ["final/model.safetensors", "final/README.md", "metrics.jsonl"]
    names += [str(file.relative_to(alone)) for file in sorted(alone.glob("eval/*/pairs.jsonl"))]
    for name in names:
        if (alone / name).read_bytes() != (killed / name).read_bytes():
            return f"{name} of {killed}"
    return ""


def kill_and_compare(
    directory: Path,
    method: str,
    *,
    kills: int,
    seed: int,
    workers: int = 0,
    epochs: int = 2,
    ranks: int = 1,
    rank: int = 0,
    **others: Any,
) -> Outcome:
    """Runs of a method until so many kills have been made; ``others`` are further options of :func:`command`."""
    rng = random.Random(f"{seed}-{method}-{workers}-{ranks}-{rank}")
    material = directory / "material"
    if not material.exists():
        make_material(material)
    place = directory / f"{method}-{workers}"
    options: dict[str, Any] = {"workers": workers, "ranks": ranks, "rank": rank, **others}
    (place / "alone").mkdir(parents=True)
    began = time.monotonic()
    (place / "alone" / "seconds").write_text("1")
    trial(material, place / "alone", method, rng, kills=0, **options)
    (place / "alone" / "seconds").write_text(str(time.monotonic() - began))
    made, runs, different = 0, 0, []
    while made < kills:
        folder = place / f"trial-{runs}"
        folder.mkdir()
        made += trial(material, folder, method, rng, kills=min(rng.choice((1, 1, 2, 3)), kills - made), **options)
        runs += 1
        if found := difference(place / "alone" / "run", folder / "run"):
            different.append(found)
    return Outcome(runs, made, runs - len(different), different)


def main() -> int:
    """Kill, compare, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each method")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--ranks", type=int, default=1, help="processes of each run")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train adapters of this rank")
    parser.add_argument("--mixture", action="store_true", help="train on a mixture of two parts, for three epochs")
    parser.add_argument("--sharded", action="store_true", help="have the ranks share the weights too")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # a thread, which a fork would lose
    failed = False
    with tempfile.TemporaryDirectory() as directory:
        print(f"{'method':14} {'workers':>7} {'kills':>6} {'runs':>5} {'equal':>6}")
        for method in arguments.methods:
            for workers in arguments.workers:
                kills = arguments.kills // len(arguments.workers)
                options: dict[str, Any] = {"seed": arguments.seed, "workers": workers, "ranks": arguments.ranks}
                options |= {"rank": arguments.lora, "mixture": arguments.mixture, "sharded": arguments.sharded}
                found = kill_and_compare(Path(directory), method, kills=kills, **options)
                print(f"{method:14} {workers:7} {found.kills:6} {found.runs:5} {found.equal:6}", flush=True)
                failed = failed or bool(found.different)
                for told in found.different:
                    print(f"  differs: {told}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
