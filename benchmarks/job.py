"""What a process is asked to measure, handed over as a JSON file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """One side of one round.

    Args:
        side: ``suite`` or ``trl``.
        workload: ``sft``, ``dpo``, ``rloo`` or ``generation``.
        variant: Options beside those that this side always gets; a part each for ``model``, ``data`` and
            ``trainer`` on the suite's side, one dictionary on TRL's.
        model_dir: The model to start from.
        data_dir: The rows of a step.
        scratch_dir: An empty folder for whatever this process writes.
        rows: Rows of a step, over all processes.
        units: What the step must turn out to have; see :class:`benchmarks.workloads.Workload`.
        samples: Samples of each RLOO prompt.
        length: Tokens of each sample.
        device: ``cpu`` or ``cuda``.
        bf16: bfloat16 autocast over float32 weights (for generation alone: bfloat16 weights), else float32.
        processes: DDP processes.
        threads: Threads of each process.
        warm_up: Steps that are not timed.
        steps: Steps that are.
    """

    side: str
    workload: str
    variant: dict[str, Any]
    model_dir: str
    data_dir: str
    scratch_dir: str
    rows: int
    units: int
    samples: int
    length: int
    device: str
    bf16: bool
    processes: int
    threads: int
    warm_up: int
    steps: int

    @property
    def all_steps(self) -> int:
        """Steps with the warm-up."""
        return self.warm_up + self.steps

    def read_rows(self) -> list[dict[str, Any]]:
        """The rows of a step."""
        split = "train_prefs" if self.workload == "dpo" else "train"
        return [json.loads(line) for line in (Path(self.data_dir) / f"{split}.jsonl").read_text().splitlines()]

    def check(self, what: str, found: float, expected: float) -> None:
        """Stop where this side did other work than the other."""
        if found != expected:
            raise RuntimeError(f"{self.side} {self.workload}: {what} must be {expected}, got {found}")

    def write(self, path: Path) -> None:
        """Write the file that :meth:`read` reads."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "Job":
        """The job of a file."""
        return cls(**json.loads(path.read_text()))
