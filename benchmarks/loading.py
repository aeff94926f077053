"""What processes that share a model take together while they load it: ``python -m benchmarks.loading --model DIR``.

Each loads the whole of it in float32 and keeps a part. In turns, and all at once, in alternation; memory is the sum of
the processes' own pages (those of files, which can be read again, not counted), less what they have once everything is
imported (Linux).
"""

import argparse
import contextlib
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.shapes import SHAPES, save_model


def child(model_dir: str, room: float) -> None:
    """One of the processes: load and shard, and say how long it took."""
    from torch.distributed.device_mesh import init_device_mesh

    from core import turns
    from datamodules.chat import load_tokenizer
    from lightning_modules.models.loading import load_causal_lm
    from lightning_modules.models.sharding import Sharding, shard, turn_to_load

    torch.set_num_threads(1)
    turns.available_bytes = lambda: room
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("shards",))
    tokenizer = load_tokenizer(model_dir)
    print("ready", flush=True)
    sys.stdin.readline()
    torch.distributed.barrier()
    with turn_to_load(model_dir):
        model = load_causal_lm(model_dir, tokenizer)
        shard(model, Sharding(mesh, None))
    print(sum(parameter.numel() for parameter in model.parameters()), flush=True)
    sys.stdin.readline()


def pss(process: int) -> int:
    """Bytes of a process that no file has, what it shares with others divided among them; 0 where it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                return int(line.split()[1]) * 1024
    return 0


def measure(model_dir: str, processes: int, room: float) -> tuple[float, float, float]:
    """Bytes at most, bytes in the end, and seconds."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    launched = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    command = [sys.executable, "-m", "benchmarks.loading", "--child", str(room), "--model", model_dir]
    started = [
        subprocess.Popen(
            command, env={**launched, "RANK": str(rank)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for rank in range(processes)
    ]
    outputs = [process.stdout for process in started]
    for output in outputs:
        assert output is not None
        assert output.readline() == "ready\n"
    before = sum(pss(process.pid) for process in started)
    began, most = time.monotonic(), 0
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for output in outputs:
        assert output is not None
        os.set_blocking(output.fileno(), False)
    waiting = set(range(processes))
    while waiting:
        most = max(most, sum(pss(process.pid) for process in started))
        waiting -= {rank for rank in waiting if outputs[rank].readline()}  # type: ignore[union-attr]
        time.sleep(0.005)
    took, after = time.monotonic() - began, sum(pss(process.pid) for process in started)
    for process in started:
        process.communicate("\n")
    return most - before, after - before, took


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model's directory; one with random weights where not given")
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES, help="of that")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.model, options.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            save_model(SHAPES[options.shape], Path(folder))
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
            model.save_pretrained(folder)  # as models are published; what a file has in float32 is not copied at all
        model_dir = options.model or folder
        print("| round | processes | most, MB | in the end, MB | seconds |\n|---|---|---|---|---|")
        for number in range(1, options.rounds + 1):
            for name, room in (("at once", math.inf), ("in turns", 1.0)):
                most, after, took = measure(model_dir, options.processes, room)
                sizes = f"{most / 1e6:,.0f} | {after / 1e6:,.0f}"
                print(f"| {number} | {options.processes} {name} | {sizes} | {took:.1f} |", flush=True)


if __name__ == "__main__":
    main()
