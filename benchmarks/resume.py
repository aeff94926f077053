"""What exact resume costs: SFT steps a second with it and without, in turns within one process.

python -m benchmarks.resume [--rounds 7] [--steps 40]

Without: a plain shuffling loader, no seeds per batch, no ExactResume and no TrainingHealth. The model is small, so that
a step is short and what surrounds it shows.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from typing_extensions import override

from benchmarks.shapes import SHAPES, save_model
from callbacks import TrainingHealth
from callbacks.checkpoints.exact_resume import ExactResume
from datamodules import SmolTalkDataModule
from lightning_modules import SFTModule


class PlainData(SmolTalkDataModule):
    """The same rows through torch's own shuffling."""

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        ours = super().train_dataloader()
        return DataLoader(ours.dataset, batch_size=self.batch_size, shuffle=True, collate_fn=ours.collate_fn)


class PlainSFT(SFTModule):
    """Without seeds of its own for each batch."""

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        pass


def steps_per_second(model_dir: Path, data_dir: Path, *, exact: bool, steps: int) -> float:
    """Of one fit, its first quarter left out."""
    module, data = (SFTModule, SmolTalkDataModule) if exact else (PlainSFT, PlainData)
    marks: list[float] = []

    class Marked(module):  # type: ignore[misc, valid-type]
        @override
        def on_train_batch_end(self, *_: Any) -> None:
            marks.append(time.perf_counter())

    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[ExactResume(), TrainingHealth()] if exact else [],
    )
    loader = data(model_name=str(model_dir), dataset_name=str(data_dir), batch_size=4, max_length=128)
    trainer.fit(Marked(str(model_dir)), datamodule=loader)
    first = len(marks) // 4
    return (len(marks) - 1 - first) / (marks[-1] - marks[first])


def main() -> None:
    """Measure in turns, and print the ratio of each round and their median."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--shape", choices=SHAPES, default="v32k")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model_dir, data_dir = Path(folder) / "model", Path(folder) / "data"
        save_model(SHAPES[options.shape], model_dir)
        data_dir.mkdir()
        talk = [{"role": "user", "content": "Ab" * 40}, {"role": "assistant", "content": "Cd" * 40}]
        for split in ("train", "test"):
            (data_dir / f"{split}.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 4 * options.steps)
        ratios = []
        for number in range(options.rounds):
            rates = {}
            for exact in (True, False) if number % 2 else (False, True):
                rates[exact] = steps_per_second(model_dir, data_dir, exact=exact, steps=options.steps)
            ratios.append(rates[True] / rates[False])
            print(f"round {number + 1}: exact {rates[True]:.2f}, plain {rates[False]:.2f} steps/s: {ratios[-1]:.3f}")
    print(f"median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
