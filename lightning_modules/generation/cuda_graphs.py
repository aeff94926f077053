"""Replaying a decode step as a CUDA graph, so that Python's and the launches' cost is paid once for many tokens.

A graph is a recording of kernels with the addresses that they read and write. So whatever changes between steps must be
copied to where the recording reads it (tokens and positions), whatever grows must already be there (the cache at its
final length), and what decides which kernels run (rows, and the width in whole blocks) is part of the key under which
the recording is kept. The first run before a capture writes the same keys and values that the replay writes again.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor, int], Tensor]
"""From tokens, positions and a width to logits; it may write to storage that stays where it is."""


class Captured(NamedTuple):
    """A graph, where it reads its inputs, and where it leaves its result."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    positions: Tensor
    logits: Tensor


class StepGraphs:
    """Captures a step when the batch size or the width changes, and replays it until then.

    Off CUDA, and where a capture fails, the step runs as it is. A result holds until the next step.
    """

    def __init__(self) -> None:
        self.key = (0, 0)
        self.captured: Captured | None = None

    def run(self, step: Step, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        """The step's result.

        Args:
            step: The same function at each call, and such that a second run with the same inputs changes nothing.
            tokens: One for each row.
            positions: Where they go.
            width: Cached places that the step looks at; part of what is captured.
        """
        if tokens.is_cuda and self.key != (len(tokens), width):
            self.key, self.captured = (len(tokens), width), None  # frees the last graph's memory first
            self.captured = _capture(step, tokens.clone(), positions.clone(), width)
        if self.captured is None:
            return step(tokens, positions, width)
        self.captured.tokens.copy_(tokens)
        self.captured.positions.copy_(positions)
        self.captured.graph.replay()
        return self.captured.logits


def _capture(step: Step, tokens: Tensor, positions: Tensor, width: int) -> Captured | None:
    """A first run, on a stream of its own, lets libraries set up what they may not set up during a capture."""
    try:
        current, aside = torch.cuda.current_stream(tokens.device), torch.cuda.Stream(tokens.device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            step(tokens, positions, width)
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = step(tokens, positions, width)
    except RuntimeError as error:
        warnings.warn(f"decoding without a CUDA graph, which takes longer: {error}", stacklevel=2)
        return None
    return Captured(graph, tokens, positions, logits)
