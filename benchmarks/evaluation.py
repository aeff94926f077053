"""How fast an evaluation's scores come from a server on loopback, against what latency, parallelism and rate allow.

python benchmarks/evaluation.py [--prompts 1000] [--latency-s 0.05] [--parallel 8] [--rate 0] [--processes 1]

Prints the seconds, their ratio to the bound, and the most requests that the server got within any minute.
"""

import argparse
import contextlib
import json
import multiprocessing
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from callbacks.evaluation.cache import EvaluationCache, ScoreMemory
from callbacks.evaluation.scores import Scorer
from lightning_modules.rewards import NemotronReward


def serve(latency_s: float, ready: Any, arrivals: Any, done: Any) -> None:
    """Answer every request after the latency, and hand over when each arrived."""
    moments: list[float] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1

        def do_POST(self) -> None:
            moments.append(time.time())
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(latency_s)
            body = json.dumps({"choices": [{"message": {"content": "reward:-3.28"}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

    import threading

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ready.put(server.server_port)
    done.wait()
    arrivals.put(moments)


def evaluate(name: str, arguments: argparse.Namespace, port: int, cache_dir: str, seconds: Any) -> None:
    """Score both sides of every prompt, as an evaluation does."""
    reward = NemotronReward(
        base_url=f"http://127.0.0.1:{port}/v1",
        requests_per_minute=arguments.rate,
        parallel_requests=arguments.parallel,
    )
    prompts = [[{"role": "user", "content": f"{name} question {i // 2}"}] for i in range(2 * arguments.prompts)]
    completions = [f"an answer of some length, number {i}" for i in range(2 * arguments.prompts)]
    with contextlib.closing(EvaluationCache(Path(cache_dir) / "evaluation.sqlite")) as cache:
        started = time.perf_counter()
        scores = Scorer(reward, cache, ScoreMemory())(prompts, completions)
        seconds.put(time.perf_counter() - started)
    assert scores == [-3.28] * len(scores)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--latency-s", type=float, default=0.05)
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--rate", type=int, default=0, help="requests a minute; 0 for no limit")
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ready, arrivals, seconds, done = context.Queue(), context.Queue(), context.Queue(), context.Event()
    server = context.Process(target=serve, args=(arguments.latency_s, ready, arrivals, done))
    server.start()
    port = ready.get()
    with tempfile.TemporaryDirectory() as cache_dir:
        jobs = [
            context.Process(target=evaluate, args=(f"process {i}", arguments, port, cache_dir, seconds))
            for i in range(arguments.processes)
        ]
        for job in jobs:
            job.start()
        took = max(seconds.get() for _ in jobs)
        for job in jobs:
            job.join()
    done.set()
    moments = sorted(arrivals.get())
    server.join()
    calls = 2 * arguments.prompts * arguments.processes
    bound = calls * arguments.latency_s / (arguments.parallel * arguments.processes)
    if arguments.rate:  # the first minute's requests may go at once
        bound = max(bound, 60.0 * ((calls - 1) // arguments.rate))
    most = max(sum(first <= moment < first + 60.0 for moment in moments) for first in moments)
    print(f"{calls} calls in {took:.2f} s, {took / bound:.2f} x the bound of {bound:.2f} s; at most {most} in a minute")


if __name__ == "__main__":
    main()
