"""Several machines on one: each has folders of its own in a place of its own, and a loopback address.

python -m tests.nodes --launcher torchrun --methods DPOModule RLOOModule
python -m tests.nodes --launcher srun --sharded

A "node" runs in a mount namespace (``unshare``, which needs to be allowed) with an empty file system where all work is
done, so that what one node writes no other node sees. Of srun a stand-in sets the variables, a process a task.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.forked import free_port
from tests.kills import METHODS, command, make_material

ROOT = Path(__file__).parents[1]
LIMIT_S = 240.0
HOSTS = ("127.0.0.1", "127.0.0.2")
TASKS = 2
"""Processes a node."""


def separate() -> bool:
    """Whether nodes with disks of their own can be had here."""
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    return tried.returncode == 0


def on_node(place: Path, script: str) -> list[str]:
    """A command that runs a script where ``place`` is a disk of its own, with what lay there copied to it."""
    steps = f"""
        set -e
        copy=$(TMPDIR= mktemp -d)
        cp -a {place}/. $copy/
        mount -t tmpfs tmpfs {place}
        cp -a $copy/. {place}/
        {script}
    """
    return ["unshare", "--mount", "bash", "-c", steps]


def torchrun(arguments: Sequence[str], node: int, port: int, *, tasks: int = TASKS, nodes: int = 2) -> str:
    """What a node runs under torchrun."""
    options = ["--nnodes", nodes, "--nproc-per-node", tasks, "--node-rank", node]
    options += ["--master-addr", HOSTS[0], "--master-port", port]
    return (
        ""
        + shlex.join([sys.executable, "-m", "torch.distributed.run", *map(str, options), "cli.py", *arguments])
        + "; code=$?; [ $code = 0 ] || exit $code"
    )


def srun(arguments: Sequence[str], node: int, port: int, *, tasks: int = TASKS, nodes: int = 2, **more: Any) -> str:
    """What a node runs under srun: a process a task, told by SLURM's variables which one it is."""
    processes = []
    for local in range(tasks):
        variables: Mapping[str, Any] = {
            "SLURM_JOB_ID": "4242",
            "SLURM_JOB_NAME": "rehearsal",
            "SLURM_NTASKS": nodes * tasks,
            "SLURM_NTASKS_PER_NODE": tasks,
            "SLURM_NNODES": nodes,
            "SLURM_PROCID": node * tasks + local,
            "SLURM_LOCALID": local,
            "SLURM_NODEID": node,
            "SLURM_STEP_ID": 0,
            "SLURM_NODELIST": ",".join(HOSTS),
            "MASTER_PORT": port,
            **more,
        }
        told = [f"{name}={value}" for name, value in variables.items() if value is not None]
        processes.append(shlex.join(["env", *told, sys.executable, "cli.py", *arguments]) + " &")
    return "\n".join(
        [*processes, "code=0; for job in $(jobs -p); do wait $job || code=$?; done; [ $code = 0 ] || exit $code"]
    )


LAUNCHERS = {"torchrun": torchrun, "srun": srun}


def start(scripts: Sequence[str], place: Path, *, log: Path) -> list[subprocess.Popen[bytes]]:
    """Each script on a node of its own; ``place`` is what they do not share."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "HF_DATASETS_CACHE": str(place / "datasets"), "TMPDIR": str(place)}
    nodes = []
    for number, script in enumerate(scripts):
        with log.with_suffix(f".{number}").open("wb") as file:
            arguments = on_node(place, script)
            nodes.append(subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=file, stderr=file))
    return nodes


def ended(nodes: Sequence[subprocess.Popen[bytes]], limit_s: float = LIMIT_S) -> tuple[list[int | None], float]:
    """The exit code of each node, None for one that has not ended in time, and the seconds until the last one did."""
    began = time.monotonic()
    codes: list[int | None] = []
    for node in nodes:
        try:
            codes.append(node.wait(max(0.0, limit_s - (time.monotonic() - began))))
        except subprocess.TimeoutExpired:
            codes.append(None)
            node.kill()
    return codes, time.monotonic() - began


def printed(log: Path) -> str:
    """What all nodes have printed."""
    return "".join(file.read_text(errors="replace") for file in sorted(log.parent.glob(f"{log.stem}.[0-9]")))


def rehearse(folder: Path, method: str, launcher: str, *, sharded: bool) -> tuple[bool, str]:
    """Train on two nodes, and go on for an epoch more; whether both ended well, and what they printed."""
    place = folder / method
    if not place.exists():
        make_material(place / "material")
    arguments = command(place / "material", place / "run", method, ranks=TASKS, sharded=sharded)
    arguments += ["--trainer.num_nodes", "2", *([] if sharded else ["--trainer.strategy", "ddp"])]
    runs = [(arguments, free_port()), ([*arguments, "--trainer.max_epochs", "3"], free_port())]
    scripts = []
    for node in range(2):
        lines = [f"( {LAUNCHERS[launcher](own, node, port)} ) || exit $?" for own, port in runs]
        lines.append(f"find {place}/run {place}/cache | sort | sed 's/^/there is /'")
        scripts.append("\n".join(lines))
    log = folder / f"{method}.log"
    codes, seconds = ended(start(scripts, place, log=log))
    print(f"{launcher:10} {method:14} {'sharded' if sharded else 'ddp':8} {codes!s:8} {seconds:4.0f} s", flush=True)
    return codes == [0, 0], printed(log)


def main() -> int:
    """Train each method on two nodes, and print how that ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launcher", choices=LAUNCHERS, default="torchrun")
    parser.add_argument("--methods", nargs="+", default=["DPOModule", "RLOOModule"], choices=METHODS)
    parser.add_argument("--sharded", action="store_true")
    options = parser.parse_args()
    if not separate():
        print("this machine lets nobody have a mount namespace of his own")
        return 2
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for method in options.methods:
            well, text = rehearse(Path(folder), method, options.launcher, sharded=options.sharded)
            print(text if not well else "".join(line for line in text.splitlines(True) if line.startswith("there is")))
            failed = failed or not well
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
