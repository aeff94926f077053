"""One process of a measurement: ``python -m benchmarks.side JOB.json RESULT.json``; ``benchmarks.run`` starts it."""

import importlib
import json
import os
import sys
import warnings
from pathlib import Path

import torch

from benchmarks.job import Job
from benchmarks.meter import Meter, matmul_flops, memory_bytes


def main() -> None:
    """Run the job, then measure the machine with the same threads, and write both."""
    warnings.simplefilter("ignore")
    job = Job.read(Path(sys.argv[1]))
    torch.set_num_threads(job.threads)
    side = importlib.import_module(f"benchmarks.{job.side}_side")
    meter = Meter(job.device, warm_up=job.warm_up, processes=job.processes)
    meter.start()
    getattr(side, job.workload)(job, meter.tick)
    result = meter.result()
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        result["matmul_flops"] = matmul_flops(job.device, torch.bfloat16 if job.bf16 else torch.float32)
        result["memory_bytes"] = memory_bytes(job.device)
        Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
