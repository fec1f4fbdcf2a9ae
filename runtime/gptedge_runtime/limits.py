"""What a call may use: CPUs, and time until it is stopped."""

import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from .errors import InputError, TimeLimitError, shown

ShouldStop = Callable[[], bool]
T = TypeVar("T")

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: "microseconds of CPU time, period", or "max period"


def never() -> bool:
    """Stop at no time."""
    return False


class TimeLimit:
    """A ``should_stop`` that raises :class:`TimeLimitError` from ``timeout_s`` seconds on, counted from now."""

    def __init__(self, timeout_s: float | None, should_stop: ShouldStop = never) -> None:
        self._timeout_s, self._should_stop = timeout_s, should_stop
        self._end = time.monotonic() + (math.inf if timeout_s is None else timeout_s)

    def __call__(self) -> bool:
        """Ask the caller's ``should_stop``, too."""
        if time.monotonic() >= self._end:
            raise TimeLimitError(f"not done after {self._timeout_s:g} seconds: allow more time, or distrust the bundle")
        return self._should_stop()

    def pausing(self, steps: Iterator[T]) -> Iterator[T]:
        """Yield what comes; the time that the reader takes for itself does not count."""
        for step in steps:
            paused = time.monotonic()
            yield step
            self._end += time.monotonic() - paused


class Stopped(Exception):  # noqa: N818 - an answer to should_stop, not an error
    """``should_stop`` said so during a prefill."""


def count_threads(threads: int | None) -> int:
    """Return how many threads to use: at most the CPUs this process may run on, since more are many times slower."""
    if threads is not None and (type(threads) is not int or threads < 1):
        raise InputError(f"threads is {shown(threads)}: give a whole number of at least 1")
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed = min(allowed, _read_quota() or allowed)
    return min(threads or allowed, allowed)


def _read_quota() -> int | None:
    """Return the CPUs whose time a container may use, rounded up; None where nothing limits it."""
    try:
        quota, period = CPU_QUOTA.read_text("ascii").split()
        return max(1, -(-int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return None


def check_timeout(timeout_s: float | None) -> None:
    """Raise :class:`InputError` for a time limit that is no number of seconds above 0."""
    if timeout_s is not None and (type(timeout_s) not in (int, float) or not 0 < timeout_s <= 1e9):
        raise InputError(f"timeout_s is {shown(timeout_s)}: give a number of seconds above 0, at most 1e9")
