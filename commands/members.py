"""The processes of a run, as each describes itself, and what does not fit among them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from core.text import shown


class Member(NamedTuple):
    """What a process says of itself."""

    host: str
    processes: int
    """How many it takes the run to have."""
    device: str
    """What it trains on; two processes of a host cannot have the same GPU."""
    versions: dict[str, str]
    code: str
    """A digest of the suite's own files."""
    options: dict[str, Any]
    """By dotted name, as plain values."""
    checkpoint: str
    """What it goes on from; empty where it begins."""


def judge(
    found: Mapping[int, Member], doubled: Mapping[int, Sequence[Member]], processes: int, patience_s: float
) -> str:
    """The first thing that does not fit, and what to change; empty where all is well.

    Args:
        found: Who has come, by number; the first one has.
        doubled: Of a number that several processes take for theirs, all of those.
        processes: How many there should be.
        patience_s: How long was waited for them.
    """
    for rank, members in doubled.items():
        hosts = " and ".join(dict.fromkeys(member.host for member in members))
        return f"{len(members)} processes take themselves for number {rank}, on {hosts}; give each machine a NODE_RANK"
    differences = (difference(found[0], rank, member) for rank, member in found.items())
    if told := next(filter(None, differences), ""):
        return told
    if missing := [rank for rank in range(processes) if rank not in found]:
        several = len(missing) > 1
        return (
            f"process{'es' if several else ''} {ranges(missing)} of {processes} did not come within {patience_s:.0f} s,"
            f" where {listed(found)} did; start {'them' if several else 'it'}, or lower trainer.devices or "
            "trainer.num_nodes"
        )
    return same_gpu(found)


def difference(first: Member, rank: int, member: Member) -> str:
    """In what a process cannot be of one run with the first one."""
    here, there = named(rank, member), named(0, first)
    if member.processes != first.processes:
        return (
            f"{here} takes the run to have {member.processes} processes, {there} {first.processes}; set "
            "trainer.devices and trainer.num_nodes alike everywhere"
        )
    for name in sorted(first.versions.keys() | member.versions.keys()):
        if member.versions.get(name) != first.versions.get(name):
            own, other = member.versions.get(name), first.versions.get(name)
            return f"{here} has {name} {own}, {there} {other}; install the same"
    if member.code != first.code:
        return f"{here} runs other code of this suite than {there}; check out the same"
    for name in sorted(first.options.keys() | member.options.keys()):
        if member.options.get(name) != first.options.get(name):
            own, other = member.options.get(name), first.options.get(name)
            return f"{here} was started with {name} {own}, {there} with {other}; give all the same"
    if member.checkpoint != first.checkpoint:
        own, other = (who.checkpoint or "nothing" for who in (member, first))
        return (
            f"{here} would go on from {own}, {there} from {other}; have the run's folder on a disk that all machines "
            "share, or copy its checkpoints to each"
        )
    return ""


def same_gpu(found: Mapping[int, Member]) -> str:
    """Which processes have a GPU together, as where each machine's take themselves for the first of it."""
    owners: dict[tuple[str, str], int] = {}
    for rank, member in found.items():
        owner = owners.setdefault((member.host, member.device), rank)
        if owner != rank and member.device.startswith("cuda"):
            return f"processes {owner} and {rank} have the same GPU, {member.device} of {member.host}; one a process"
    return ""


def named(rank: int, member: Member) -> str:
    """A process and its host."""
    return f"process {rank} on {member.host}"


def listed(found: Mapping[int, Member]) -> str:
    """Which processes are on which host."""
    hosts: dict[str, list[int]] = {}
    for rank, member in found.items():
        hosts.setdefault(member.host, []).append(rank)
    return ", ".join(f"{ranges(ranks)} on {host}" for host, ranks in hosts.items())


def ranges(numbers: Sequence[int]) -> str:
    """Numbers that go up, as 0-3 and 5."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def told(members: Mapping[int, Member]) -> str:
    """What the run consists of: a line of what is the same everywhere, and one a host."""
    first = members[0]
    config = hashlib.sha256(json.dumps(first.options, sort_keys=True).encode()).hexdigest()[:8]
    versions = ", ".join(f"{name} {first.versions[name]}" for name in ("torch", "lightning", "transformers"))
    lines = [f"{len(members)} processes with {versions}, config {config}"]
    hosts: dict[str, dict[int, Member]] = {}
    for rank, member in members.items():
        hosts.setdefault(member.host, {})[rank] = member
    for host, own in hosts.items():
        kinds = ", ".join(dict.fromkeys(member.device.partition(" (")[0] for member in own.values()))
        lines.append(f"  {shown(host)}: {ranges(list(own))} on {kinds}")
    return "\n".join(lines)
