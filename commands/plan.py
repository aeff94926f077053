"""``plan``: what a run will take, before a weight is loaded: memory by part, steps, tokens, the judge's calls, disk."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from commands import options
from commands.configured import Configured, configured
from commands.planning.memory import peak
from commands.planning.plan import Plan, device_of, planned
from commands.planning.work import disk_bytes
from core.errors import ConfigurationError
from core.memory import available_bytes
from core.text import shown

GB = 1e9
SPARE = 0.92
"""The share of a GPU's memory that a plan may fill; fragmentation and CUDA's own take the rest."""


def run() -> None:
    """Parse the command line and print the plan; exit code 1 where it does not fit."""
    own, rest = options.plan().parse_known_args(sys.argv[1:])
    if own.memory is not None and not own.memory > 0:
        raise ConfigurationError(f"--memory must be positive, got {own.memory}")
    settings = configured(rest)
    device = device_of(settings, planned_for=own.memory)
    plan = planned(settings, device)
    available = own.memory * GB if own.memory else memory_at_hand(device)
    if own.json:
        print(json.dumps(as_plain(plan, available), indent=2))
    else:
        show(Console(), settings, plan, device, available)
    if peak(plan.moments).total > SPARE * available:
        raise SystemExit(1)


def memory_at_hand(device: str) -> float:
    """Bytes of the smallest GPU, or what the machine has free."""
    if device == "cuda" and torch.cuda.is_available():
        cards = range(torch.cuda.device_count())
        return float(min(torch.cuda.get_device_properties(card).total_memory for card in cards))
    if device == "cuda":
        raise ConfigurationError("torch sees no GPU here: say how much memory the GPU to plan for has (--memory 24)")
    return available_bytes()


def show(console: Console, settings: Configured, plan: Plan, device: str, available: float) -> None:
    """Print the plan."""

    def line(text: str) -> None:
        console.print(shown(text), markup=False, highlight=False, soft_wrap=True)

    module, traced, done = settings.model, plan.account.traced, plan.work
    line(f"{module.method} of {module.model_name} on {settings.data().dataset_name}")
    line(f"parameters   {rounded(traced.parameters.all)}, {rounded(traced.trained.all)} of them trained")
    tokens = int(plan.batch.tokens.attention_mask.sum())
    line(f"batch        at most about {tokens:,} tokens a process, by the first rows of the data")
    line(
        f"work         {done.rows:,} rows x {done.epochs} epochs = {done.steps:,} steps, {rounded(done.tokens)} "
        f"tokens, on {plan.processes} {'process' if plan.processes == 1 else 'processes'}"
    )
    if done.evaluations:
        calls = f", {done.calls:,} calls of the judge" if done.calls else ""
        rate = f", {done.minutes:,.0f} minutes by its rate" if done.minutes else ""
        line(f"judge        {done.evaluations} evaluations{calls}{rate}")
    disk = disk_bytes(plan.account)
    free = shutil.disk_usage(Path.cwd()).free
    kinds = " + ".join(f"{name} {size / GB:.1f}" for name, size in disk.items())
    few = "; more than is free here" if sum(disk.values()) > free else ""
    line(f"disk         {sum(disk.values()) / GB:.1f} GB ({kinds}), {free / GB:.0f} GB free here{few}")
    most = peak(plan.moments)
    line(f"\nmemory of a process on {'a GPU' if device == 'cuda' else 'the CPU'} at its most, in the {most.name}, GB")
    for name, size in most.parts.items():
        if size.all:
            line(f"  {name:26}{size.all / GB:8.2f}")
    line(f"  {'together':26}{most.total / GB:8.2f}")
    others = [f"{moment.name} {moment.total / GB:.2f}" for moment in plan.moments if moment is not most]
    line(f"at other moments: {', '.join(others)}")
    fits = most.total <= SPARE * available
    line(f"\n{'fits' if fits else 'does not fit'}: {most.total / GB:.2f} GB of {available / GB:.1f} GB")
    if not fits:
        line(advice(settings, device, available))


def rounded(count: float) -> str:
    """A count in millions, or in full where that would say little."""
    return f"{count / 1e6:,.1f} million" if count >= 1e5 else f"{round(count):,}"


def advice(settings: Configured, device: str, available: float) -> str:
    """The first change of options with which the run fits, the one that costs least first."""
    tried = []
    size = settings.data().batch_size
    while size > 1 and settings.data().tokens_per_batch is None:
        size //= 2
        tried.append((f"--data.batch_size {size} with --trainer.accumulate_grad_batches", {"batch_size": size}))
    tried.append(("--model.gradient_checkpointing true as well", {"gradient_checkpointing": True}))
    for words, changes in tried:
        if peak(planned(settings, device, **changes).moments).total <= SPARE * available:
            return f"it would with {words}"
    return "what is left is an adapter (--config configs/adapters/lora.yaml, or qlora.yaml) or a smaller model"


def as_plain(plan: Plan, available: float) -> dict[str, Any]:
    """The plan in plain values, sizes in bytes."""
    most = peak(plan.moments)
    return {
        "parameters": plan.account.traced.parameters.all,
        "trained": plan.account.trained.all,
        "processes": plan.processes,
        "work": plan.work._asdict(),
        "disk": disk_bytes(plan.account),
        "moments": {
            moment.name: {**{name: size.all for name, size in moment.parts.items()}, "together": moment.total}
            for moment in plan.moments
        },
        "peak": {"moment": most.name, "bytes": most.total},
        "available": None if available == float("inf") else int(available),
        "fits": most.total <= SPARE * available,
    }
