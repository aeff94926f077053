"""Validation figures on one process and on several, for few rows: the largest difference of any figure.

python -m tests.shards --rows 1 2 3 4 5 6 7 8 9 --ranks 2 3 [--sharded [--cramped]]
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from cli import main as cli_main
from lightning_modules.generation.sampler import sample_completions
from lightning_modules.models.sharding import sharding_of
from tests.forked import ended, start
from tests.kills import METHODS
from tests.splitting import BREVITY, command, comparable, make_material

TOLERANCE = 1e-6


def figures(
    directory: Path, method: str, *, rows: int, ranks: int, budget: int | None, sharded: bool, cramped: bool
) -> dict[str, float | None]:
    """What ``validate`` finds, with everything on the first rows alone."""
    run = directory / f"{method}-{rows}-{ranks}-{budget}"
    options = {"max_samples": rows, "batch_size": 2, "tokens_per_batch": budget}
    arguments = command(directory / "material", run, method, ranks=ranks, sharded=sharded and ranks > 1, **options)
    arguments = ["validate", *arguments[1:], "--model.model_name", str(directory / "material" / "model")]
    arguments += ["--trainer.limit_val_batches", "1.0"]
    evaluation = {
        "num_prompts": min(rows, 3),  # of one, processes but the first have none; of three, two have other numbers
        "batch_size": 1,
        "max_completion_length": 6,
        "reward": BREVITY,
        "max_failed_share": 1.0,
        "dataset_name": directory / "material",
        "reference_model": directory / "material" / "reference",
        "cache_dir": run / "cache",
    }
    arguments += [word for name, value in evaluation.items() for word in (f"--evaluation.{name}", str(value))]
    in_parts = sharded and cramped and ranks > 1

    def sampled(model: Any, *given: Any, **named: Any) -> Any:
        assert (sharding_of(model) is not None) == in_parts, "a policy or a reference is whole, or is not"
        return sample_completions(model, *given, **named)

    def judged() -> int:
        room = mock.patch("lightning_modules.models.sharding.free_bytes", return_value=0.0 if cramped else math.inf)
        memory = mock.patch("core.turns.available_bytes", return_value=1.0 if cramped else math.inf)
        evaluating = mock.patch("callbacks.evaluation.completions.sample_completions", sampled)
        with comparable(), room, memory, evaluating:
            return cli_main(arguments)

    log = directory / "log.txt"
    codes = ended(start(judged, ranks=ranks, log=log))
    if any(code != 0 for code in codes):
        raise RuntimeError(f"{method}, {rows} rows on {ranks} ranks: exit codes {codes}\n{log.read_text()[-3000:]}")
    (line,) = (run / "validation.jsonl").read_text().splitlines()
    return {name: value for name, value in json.loads(line).items() if name.startswith(("val/", "eval/"))}


def apart(figure: float | None, alone: float | None) -> float:
    """How far two figures are from each other, against the size of one; not at all where neither is known."""
    if figure is None or alone is None:
        return 0.0 if figure is alone else math.inf
    return abs(figure - alone) / max(1.0, abs(alone))


def main() -> int:
    """Validate everywhere, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rows", type=int, nargs="+", default=list(range(1, 10)))
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--sharded", action="store_true", help="have the ranks share the weights too")
    parser.add_argument(
        "--cramped", action="store_true", help="have no room for a copy of the whole, nor for two to load"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        make_material(directory / "material", rows=max(options.rows))
        print(f"{'method':14} {'budget':>6} {'rows':>4} {'ranks':>5} {'figures':>7} difference")
        for method in options.methods:
            for budget in (None,) if method == "RLOOModule" else (None, 150):
                for rows in options.rows:
                    how: dict[str, Any] = {
                        "rows": rows,
                        "budget": budget,
                        "sharded": options.sharded,
                        "cramped": options.cramped,
                    }
                    alone = figures(directory, method, ranks=1, **how)
                    for ranks in options.ranks:
                        found = figures(directory, method, ranks=ranks, **how)
                        worst = max(apart(found[name], value) for name, value in alone.items())
                        failed = failed or worst > TOLERANCE or found.keys() != alone.keys()
                        told = f"{method:14} {budget or '-':>6} {rows:4} {ranks:5} {len(alone):7} {worst:.1e}"
                        print(told, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
