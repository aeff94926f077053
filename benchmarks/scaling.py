"""What distribution costs: SFT rows a second of one process and of two, by DDP and by FSDP2, in turns.

python -m benchmarks.scaling [--rounds 5] [--steps 30] [--processes 2] [--device cpu]

Every process has batches of the same size and, on a CPU, one thread, so that two do twice as much where distribution
costs nothing. Every run is of processes of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from typing_extensions import override

from benchmarks.shapes import SHAPES, save_model
from callbacks.checkpoints.sharded_strategy import ShardedStrategy
from datamodules import SmolTalkDataModule
from lightning_modules import SFTModule

BATCH = 4
LENGTH = 128


def rows_per_second(options: argparse.Namespace) -> float:
    """Of one fit, over all its processes, its first quarter left out."""
    marks: list[float] = []

    class Marked(SFTModule):
        @override
        def on_train_batch_end(self, *_: Any) -> None:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    strategy: Any = ShardedStrategy() if options.strategy == "fsdp2" else options.strategy
    trainer = Trainer(
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=options.processes,
        strategy=strategy,
        precision="bf16-mixed" if options.device == "cuda" else "32-true",
        max_steps=options.steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    folder = Path(options.folder)
    data = SmolTalkDataModule(
        model_name=str(folder / "model"), dataset_name=str(folder / "rows"), batch_size=BATCH, max_length=LENGTH
    )
    trainer.fit(Marked(str(folder / "model")), datamodule=data)
    first = len(marks) // 4
    return BATCH * options.processes * (len(marks) - 1 - first) / (marks[-1] - marks[first])


def measure(folder: Path, strategy: str, processes: int, options: argparse.Namespace) -> float:
    """One run in processes of its own."""
    given = {"folder": folder, "strategy": strategy, "processes": processes}
    given |= {"steps": options.steps, "device": options.device}
    arguments = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.scaling", *arguments]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(found.stderr[-3000:])
    return float(json.loads(found.stdout.strip().splitlines()[-1])["rows_per_second"])


def main() -> None:
    """Measure in turns, and print what each way does of what as many processes on their own would."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES, default="v32k")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--strategy", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.strategy:
        rate = rows_per_second(options)
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            print(json.dumps({"rows_per_second": rate}))
        return
    many = options.processes
    ways = [("auto", 1), ("fsdp2", 1), ("ddp", many), ("fsdp2", many)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_model(SHAPES[options.shape], folder / "model")
        (folder / "rows").mkdir()
        talk = [{"role": "user", "content": "Ab" * 40}, {"role": "assistant", "content": "Cd" * 40}]
        rows = (json.dumps({"messages": talk}) + "\n") * BATCH * many * options.steps
        for split in ("train", "test"):
            (folder / "rows" / f"{split}.jsonl").write_text(rows)
        rates: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way in ways:
                rates[way].append(measure(folder, *way, options))
    print("| | processes | rows a second | of as many on their own |\n|---|---|---|---|")
    alone = rates["auto", 1]
    for (strategy, processes), found in rates.items():
        shares = [rate / processes / single for rate, single in zip(found, alone, strict=True)]
        told = f"{statistics.median(shares):.2f} ({min(shares):.2f}..{max(shares):.2f})"
        print(f"| {strategy} | {processes} | {statistics.median(found):.1f} | {told} |")


if __name__ == "__main__":
    main()
