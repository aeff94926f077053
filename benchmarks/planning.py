"""What ``cli.py plan`` says of a run's memory, beside what the run takes: ``python -m benchmarks.planning``.

Every run is a ``cli.py fit`` in a fresh process, a few steps long, validated and exported; memory counts from when
all is imported. Models: the small ones made here, and any others by ``--model NAME=DIR``. ``--rows DIR`` has real
rows in ``ultrafeedback/`` and ``smol-smoltalk/`` in the place of random ones.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from benchmarks.shapes import SHAPES, save_model
from benchmarks.workloads import MEAN_SFT_LENGTH, Size, make

METHODS = ("sft", "reward", "dpo", "rloo")
TASKS = {"sft": "conversations", "reward": "preferences", "dpo": "preferences", "rloo": "prompts"}
CLASSES = {"sft": "SFT", "reward": "Reward", "dpo": "DPO", "rloo": "RLOO"}


def config(method: str, model: Path, rows: Path, folder: Path, options: argparse.Namespace) -> Path:
    """A run's config."""
    own: dict[str, Any] = {"model_name": str(model)}
    if options.checkpointing:
        own["gradient_checkpointing"] = True
    if options.lora:
        own["lora"] = {"rank": options.lora}
    if method == "rloo":
        own |= {"reward": "lightning_modules.rewards.rules.brevity", "max_completion_length": options.completion}
        own |= {"samples_per_prompt": 4}
    module = "SmolTalkDataModule" if method == "sft" else "UltraFeedbackDataModule"
    names = ("smol-smoltalk", "smoltalk") if method == "sft" else ("ultrafeedback",)
    place = next((rows / name for name in names if (rows / name).is_dir()), rows)
    batch = options.batch_size
    content = {
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "accelerator": "gpu" if options.device == "cuda" else "cpu",
            "precision": "bf16-mixed" if options.device == "cuda" else "32-true",
            "max_epochs": 1,
            "limit_train_batches": options.steps,
            "limit_val_batches": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {"class_path": f"lightning_modules.{CLASSES[method]}Module", "init_args": own},
        "data": {
            "class_path": f"datamodules.{module}",
            "init_args": {
                "dataset_name": str(place),
                "task": TASKS[method],
                "batch_size": batch,
                "max_length": options.length,
                "max_samples": options.steps * batch,
            },
        },
        "evaluation": {"num_prompts": 0},
        "checkpoint": {"monitor": "val/score" if method == "rloo" else "val/loss"},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def measured(file: Path, device: str) -> int:
    """Bytes that the run takes at most."""
    return int(in_fresh_process(["--device", device, "--measure", str(file)]).splitlines()[-1])


def in_fresh_process(arguments: list[str]) -> str:
    """What this script prints when it is run with the arguments."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    command = [sys.executable, "-m", "benchmarks.planning", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if found.returncode:
        raise RuntimeError(found.stderr[-3000:])
    return found.stdout


def measure(file: str, device: str) -> None:
    """Run a fit in this process and print the peak."""
    from cli import main as cli_main
    from commands import lightning  # all that a fit imports
    from core.memory import PeakMemory

    assert lightning
    memory = PeakMemory(device)
    with contextlib.redirect_stdout(io.StringIO()):
        code = cli_main(["fit", "--config", file])
    if code:
        raise SystemExit(code)
    print(memory.bytes())


def plan(file: Path) -> dict[str, Any]:
    """What ``cli.py plan`` says."""
    command = [sys.executable, "cli.py", "plan", "--json", "--config", str(file)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode not in (0, 1):
        raise RuntimeError(found.stderr[-3000:])
    content: dict[str, Any] = json.loads(found.stdout[found.stdout.index("{") :])
    return content


def made_models(scratch: Path, shapes: Iterable[str]) -> dict[str, Path]:
    """The demo's model, and random ones of the shapes."""
    from demo.material import make as make_material

    found = {}
    with contextlib.redirect_stdout(io.StringIO()):
        make_material(scratch / "material")
    found["demo"] = scratch / "material" / "model"
    for shape in shapes:
        found[shape] = scratch / shape
        save_model(SHAPES[shape], found[shape])
    return found


def main() -> None:
    """Plan and run, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=list(METHODS), metavar="method")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIR", help="further models")
    parser.add_argument("--shape", action="append", default=[], choices=SHAPES, help="further ones, random")
    parser.add_argument("--only", help="of the models")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="on cuda in bfloat16")
    parser.add_argument("--rows", type=Path, help="a folder with real rows")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=1_024, help="data.max_length")
    parser.add_argument("--completion", type=int, default=64, help="RLOO's model.max_completion_length")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--lora", type=int, default=0, metavar="RANK")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.device)
        return
    print(
        f"| {'model':8} | method | planned MB | measured MB | planned / measured | moment |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        models = made_models(scratch, {"v152k", *options.shape}) | {
            name: Path(path) for name, _, path in (m.partition("=") for m in options.model)
        }
        for name, model in models.items():
            for method in options.methods if options.only in (None, name) else ():
                folder = Path(tempfile.mkdtemp(dir=scratch))
                rows = scratch / "material" if name == "demo" else options.rows or folder
                if rows == folder:
                    shape = SHAPES[name if name in SHAPES else "tiny"]
                    count = options.steps * options.batch_size  # a run of one step has no optimiser in its forward pass
                    size = Size(tokens=count * MEAN_SFT_LENGTH, pairs=count)
                    make("dpo" if method != "sft" else "sft", shape, size, bytes_per_number=4).write(folder)
                file = config(method, model.resolve(), rows.resolve(), folder, options)
                told, took = plan(file), measured(file, options.device)
                planned = told["peak"]["bytes"]
                cells = (f"{planned / 1e6:,.0f}", f"{took / 1e6:,.0f}", f"{planned / took:.2f}", told["peak"]["moment"])
                print(f"| {name} | {method} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
