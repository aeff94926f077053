"""Measure the suite beside TRL, in turns: ``python -m benchmarks.run [sft dpo rloo generation] [--help]``."""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.job import Job
from benchmarks.shapes import SHAPES, save_model
from benchmarks.table import Result, speed, table
from benchmarks.variants import SUITE, TRL
from benchmarks.workloads import Size, Workload, make

WORKLOADS = ("sft", "dpo", "rloo", "generation")
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""glibc keeps what is freed, where by default each large tensor is mapped, and its pages cleared, anew."""
SWEEPS: dict[str, tuple[str, dict[str, list[int]]]] = {
    "tokens": ("sft", {"tokens": [2_048, 4_096, 8_192, 16_384, 32_768]}),
    "samples": ("rloo", {"samples": [2, 4, 8, 16]}),
    "length": ("rloo", {"length": [64, 128, 256, 512]}),
    "processes": ("sft", {"processes": [1, 2]}),
}


class Contestant(NamedTuple):
    """A side with a variant."""

    name: str
    side: str
    variant: dict[str, Any]
    yardstick: bool


def contestants(workload: str, sides: list[str], *, variants: bool) -> list[Contestant]:
    """The defaults of the sides, then on demand their variants."""
    found = []
    for side, table_ in (("suite", SUITE), ("trl", TRL)):
        if side in sides:
            all_ = [Contestant(name, side, variant, False) for name, variant in table_[workload].items()]
            found += [all_[0]._replace(yardstick=side == "trl"), *(all_[1:] if variants else [])]
    return found


def measure(job: Job, options: argparse.Namespace, scratch: Path) -> dict[str, float]:
    """Run the job in a process of its own.

    Raises:
        RuntimeError: If it fails; with the end of what it wrote.
    """
    folder = Path(tempfile.mkdtemp(dir=scratch))
    job = replace(job, scratch_dir=str(folder))
    job.write(folder / "job.json")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(job.threads),
        "HF_HOME": str(folder / "cache"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
        **(ALLOCATOR if options.allocator == "tuned" else {}),
    }
    command = [sys.executable, "-m", "benchmarks.side", str(folder / "job.json"), str(folder / "result.json")]
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{job.side} {job.workload} failed:\n{done.stdout[-4_000:]}")
    result: dict[str, float] = json.loads((folder / "result.json").read_text())
    return result


def rounds(
    workload: str, size: Size, processes: int, options: argparse.Namespace, scratch: Path, *, variants: bool
) -> Iterator[Result]:
    """Every contestant once a round, one after the other."""
    bf16 = options.precision == "bf16"
    work = make(workload, SHAPES[options.shape], size, bytes_per_number=2 if bf16 else 4)
    data_dir = Path(tempfile.mkdtemp(dir=scratch))
    work.write(data_dir)
    for number in range(1, options.rounds + 1):
        for contestant in contestants(workload, options.sides, variants=variants):
            job = Job(
                side=contestant.side,
                workload=workload,
                variant=contestant.variant,
                model_dir=str(scratch / "model"),
                data_dir=str(data_dir),
                scratch_dir="",
                rows=len(work.rows),
                units=work.units,
                samples=size.samples,
                length=size.row_length if workload == "generation" else size.length,
                device=options.device,
                bf16=bf16,
                processes=processes,
                threads=max(1, options.threads // processes),
                warm_up=options.warm_up,
                steps=options.steps,
            )
            figures = measure(job, options, scratch)
            result = {"workload": workload, "round": number, **_described(contestant, work, size, processes), **figures}
            load = f"{result['foreign_cores']:.2f} cores busy with other things"
            print(f"{workload} round {number}: {speed(result):9.1f} {work.unit}/s  {contestant.name} ({load})", flush=True)
            yield result


def _described(contestant: Contestant, work: Workload, size: Size, processes: int) -> dict[str, Any]:
    return {
        **contestant._asdict(),
        "size": vars(size),
        "processes": processes,
        "unit": work.unit,
        "units": work.units,
        "flops": work.flops,
        "decode_bytes": work.decode_bytes,
    }


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "transformers", "lightning", "trl")},
        "options": vars(options),
    }


def parsed_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", default=[], choices=[*WORKLOADS, []], help="all four by default")
    parser.add_argument("--shape", default="v32k", choices=SHAPES)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", choices=("32", "bf16"), help="bf16 on a GPU and 32 on a CPU by default")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--allocator", default="tuned", choices=("tuned", "default"), help="of glibc, on both sides")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=2, help="steps that are")
    parser.add_argument("--sides", nargs="+", default=["suite", "trl"], choices=("suite", "trl"))
    parser.add_argument("--variants", action="store_true", help="every option alone too")
    parser.add_argument("--sweep", choices=SWEEPS, help="how cost grows, instead of the workloads")
    for name, value in vars(Size()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks.json"))
    options = parser.parse_args()
    options.precision = options.precision or ("bf16" if options.device == "cuda" else "32")
    return options


def cases(options: argparse.Namespace) -> Iterator[tuple[str, Size, int, str]]:
    """Workload, size, processes and label of every table."""
    size = Size(**{name: getattr(options, name) for name in vars(Size())})
    if options.sweep is None:
        for workload in options.workloads or WORKLOADS:
            yield workload, size, 1, ""
        return
    workload, axis = SWEEPS[options.sweep]
    for name, values in axis.items():
        for value in values:
            if name == "processes":
                yield workload, size, value, f", {value} processes"
            else:
                yield workload, replace(size, **{name: value}), 1, f", {name} {value:,}"


def main() -> None:
    """Measure, and after each round write everything measured so far."""
    options = parsed_options()
    results: list[Result] = []
    tables: list[str] = []
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        scratch = Path(folder)
        save_model(SHAPES[options.shape], scratch / "model")
        for workload, size, processes, label in cases(options):
            own: list[Result] = []
            for result in rounds(workload, size, processes, options, scratch, variants=options.variants):
                own.append(result)
                content = {**machine(options), "results": results + own}
                options.output.write_text(json.dumps(content, indent=1, default=str) + "\n")
            results += own
            tables.append(table(workload, own, label=label))
    print("\n" + "\n\n".join(tables) + f"\n\nfigures of all rounds: {options.output}")


if __name__ == "__main__":
    main()
