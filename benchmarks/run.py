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
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from transformers.utils.logging import disable_progress_bar

from benchmarks.job import Job
from benchmarks.shapes import SHAPES, save_model
from benchmarks.table import Result, comparison, growth, speed
from benchmarks.variants import SUITE, TRL
from benchmarks.workloads import WORKLOADS, Size, Workload, make

ALLOCATORS = {
    "tuned": {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)},
    "default": {},
    "frugal": {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 17)},
}
"""What glibc does with freed memory: keep it, which is fast; what it thinks best; give it back, which shows the use."""


class Sweep(NamedTuple):
    """A workload along an axis."""

    workload: str
    axis: str
    values: list[int]


SWEEPS = {
    "tokens": Sweep("sft", "tokens", [2_048, 4_096, 8_192, 16_384, 32_768]),
    "samples": Sweep("rloo", "samples", [2, 4, 8, 16]),
    "length": Sweep("rloo", "length", [64, 128, 256, 512]),
    "processes": Sweep("sft", "processes", [1, 2]),
}


class Contestant(NamedTuple):
    """A side with a variant."""

    name: str
    side: str
    variant: dict[str, Any]
    yardstick: bool


def contestants(workload: str, options: argparse.Namespace) -> list[Contestant]:
    """The defaults of the sides, and on demand their variants."""
    found = []
    for side, variants in (("suite", SUITE[workload]), ("trl", TRL[workload])):
        if options.only in (None, side):
            first, *others = variants
            names = [first, *(name for name in others if options.variants or name in options.also)]
            found += [Contestant(name, side, variants[name], side == "trl" and name == first) for name in names]
            if options.lora and workload != "generation":
                adapted = {f"{name}, LoRA": {**variants[name], "lora": options.lora} for name in names}
                found += [Contestant(name, side, variant, False) for name, variant in adapted.items()]
    return found


def rounds(workload: str, size: Size, options: argparse.Namespace, scratch: Path) -> Iterator[Result]:
    """Every contestant once a round, one after the other."""
    bf16 = options.precision == "bf16"
    work = make(workload, SHAPES[options.shape], size, bytes_per_number=2 if bf16 else 4)
    data_dir = Path(tempfile.mkdtemp(dir=scratch))
    work.write(data_dir)
    for number in range(1, options.rounds + 1):
        for contestant in contestants(workload, options):
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
                processes=size.processes,
                threads=max(1, options.threads // size.processes),
                warm_up=options.warm_up,
                steps=options.steps,
            )
            figures = quietest(job, options, scratch)
            result = {"workload": workload, "round": number, **_described(contestant, work, size), **figures}
            load = f"{result['foreign_cores']:.2f} cores busy with other things"
            print(f"{workload} {number}: {speed(result):10.1f} {work.unit}/s  {contestant.name} ({load})", flush=True)
            yield result


def quietest(job: Job, options: argparse.Namespace, scratch: Path) -> dict[str, float]:
    """Run the job, and again where the machine was busy with other things; the least disturbed run counts."""
    best = measure(job, options, scratch)
    for _ in range(options.repeats):
        if best["foreign_cores"] > options.busy:
            best = min(best, measure(job, options, scratch), key=lambda figures: figures["foreign_cores"])
    return best


def measure(job: Job, options: argparse.Namespace, scratch: Path) -> dict[str, float]:
    """Run the job in a process of its own, with caches of its own.

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
        **ALLOCATORS[options.allocator],
    }
    command = [sys.executable, "-m", "benchmarks.side", str(folder / "job.json"), str(folder / "result.json")]
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{job.side} {job.workload} ended with {done.returncode}:\n{done.stdout[-4_000:]}")
    figures: dict[str, float] = json.loads((folder / "result.json").read_text())
    return figures


def _described(contestant: Contestant, work: Workload, size: Size) -> dict[str, Any]:
    return {
        **contestant._asdict(),
        **vars(size),
        "unit": work.unit,
        "units": work.units,
        "flops": work.flops,
        "decode_bytes": work.decode_bytes,
    }


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "transformers", "lightning", "trl")},
        "options": vars(options),
    }


def parsed_options() -> argparse.Namespace:
    """The command line, with what depends on other options filled in."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("workloads", nargs="*", metavar="workload", help=f"{', '.join(WORKLOADS)}; all by default")
    parser.add_argument("--shape", default="v32k", choices=SHAPES)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", choices=("32", "bf16"), help="bf16 on a GPU and 32 on a CPU by default")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of all processes together")
    parser.add_argument("--allocator", default="tuned", choices=ALLOCATORS, help="of glibc, on both sides")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=2, help="steps that are")
    parser.add_argument("--busy", type=float, default=0.3, help="measure again where others used more cores")
    parser.add_argument("--repeats", type=int, default=2, help="how often at most")
    parser.add_argument("--only", choices=("suite", "trl"), help="one side; in a sweep the suite by default")
    parser.add_argument("--variants", action="store_true", help="every option alone too")
    parser.add_argument("--also", action="append", default=[], metavar="NAME", help="one of them by its name")
    parser.add_argument("--lora", type=int, metavar="RANK", help="each side with an adapter of this rank too")
    parser.add_argument("--sweep", choices=SWEEPS, help="how cost grows, instead of the workloads")
    for field in fields(Size):
        parser.add_argument("--" + field.name.replace("_", "-"), type=int, default=field.default)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks.json"))
    options = parser.parse_args()
    if unknown := set(options.workloads) - set(WORKLOADS):
        parser.error(f"workloads must be among {', '.join(WORKLOADS)}, got {', '.join(sorted(unknown))}")
    if options.warm_up < 1:
        parser.error(f"--warm-up must be at least 1, got {options.warm_up}")
    options.precision = options.precision or ("bf16" if options.device == "cuda" else "32")
    options.only = options.only or ("suite" if options.sweep else None)
    if options.only != "suite" and (options.processes > 1 or options.sweep == "processes"):
        parser.error("TRL's side runs in one process; add --only suite")
    return options


def cases(options: argparse.Namespace) -> Iterator[tuple[str, Size]]:
    """Every workload and size to measure."""
    size = Size(**{field.name: getattr(options, field.name) for field in fields(Size)})
    if options.sweep is None:
        yield from ((workload, size) for workload in options.workloads or WORKLOADS)
    else:
        sweep = SWEEPS[options.sweep]
        yield from ((sweep.workload, replace(size, **{sweep.axis: value})) for value in sweep.values)


def main() -> int:
    """Measure; after each process write everything measured so far; a case that fails is reported and left out."""
    options = parsed_options()
    disable_progress_bar()
    results: list[Result] = []
    failed = False
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        scratch = Path(folder)
        save_model(SHAPES[options.shape], scratch / "model")
        for workload, size in cases(options):
            try:
                for result in rounds(workload, size, options, scratch):
                    results.append(result)
                    content = {**machine(options), "results": results}
                    options.output.write_text(json.dumps(content, indent=1, default=str) + "\n")
            except RuntimeError as error:
                failed = True
                print(f"{workload} with {size}: {error}", file=sys.stderr)
    if options.sweep is not None:
        tables = [growth(SWEEPS[options.sweep].axis, results)] if results else []
    else:
        parts = ([r for r in results if r["workload"] == workload] for workload in WORKLOADS)
        tables = [comparison(part) for part in parts if part]
    print("\n" + "\n\n".join(tables) + f"\n\nevery round: {options.output}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
