"""Calls to rewards of the user's own code, which may hang, end the process or write into what they are given."""

import copy
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from core.errors import ConfigurationError
from datamodules.messages import Message

TIME_LIMIT_S = 3600.0
"""For one call; a reward's own ``time_limit_s`` goes first."""

Job = tuple[Callable[[], Any], "queue.SimpleQueue[tuple[Any, BaseException | None]]"]


class Worker:
    """A thread that calls one after the other, so that what a reward keeps for its thread is there again.

    It is left to itself where a call does not return, and the next call has a new one.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True, name="rewards")
        self._thread.start()

    def call(self, work: Callable[[], Any], time_limit_s: float) -> Any:
        """What the work returns.

        Raises:
            queue.Empty: If it has not returned in time.
            BaseException: What it raised.
        """
        if threading.current_thread() is self._thread:  # a reward that asks another
            return work()
        results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._jobs.put((work, results))
        result, error = results.get(timeout=time_limit_s)
        if error is not None:
            raise error
        return result

    @torch.no_grad()
    def _work(self) -> None:
        while True:
            work, results = self._jobs.get()
            try:
                results.put((work(), None))
            except BaseException as error:  # also what would end the process
                results.put((None, error))


_worker: list[Worker] = []


def call(reward: Any, name: str, prompts: Sequence[Sequence[Message]], completions: Sequence[str]) -> Any:
    """What a reward returns for copies of prompts and completions.

    Raises:
        ConfigurationError: If it ends the process, or does not return in its time.
    """
    given = copy.deepcopy([list(prompt) for prompt in prompts]), list(completions)
    time_limit_s = float(getattr(reward, "time_limit_s", TIME_LIMIT_S))
    if not _worker:
        _worker.append(Worker())
    try:
        return _worker[0].call(lambda: reward(*given), time_limit_s)
    except queue.Empty:
        _worker.clear()
        raise ConfigurationError(
            f"the reward {name} has not scored {len(completions)} completions within {time_limit_s:g} s; mend it, or "
            "give it a longer time_limit_s of its own, in seconds"
        ) from None
    except SystemExit as error:
        raise ConfigurationError(
            f"the reward {name} tried to end the process ({error!r}); it must return scores"
        ) from None
