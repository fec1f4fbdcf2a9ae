"""What a call may use: CPUs, and time until it is stopped."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from .errors import InputError, TimeLimitError, shown

T = TypeVar("T")
ShouldStop = Callable[[], bool]

POLL_S = 0.02
MOST_RUNS = 256  # in workers at the same time; others wait for one to end
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: "microseconds of CPU time, period", or "max period"


def never() -> bool:
    """Stop at no time."""
    return False


def until(timeout_s: float | None, should_stop: ShouldStop) -> ShouldStop:
    """Return a ``should_stop`` that raises :class:`TimeLimitError` from ``timeout_s`` seconds on, counted from now."""
    if timeout_s is None:
        return should_stop
    end = time.monotonic() + timeout_s

    def check() -> bool:
        if time.monotonic() >= end:
            raise TimeLimitError(f"not done after {timeout_s:g} seconds: allow more time, or distrust the bundle")
        return should_stop()

    return check


class Stopped(Exception):  # noqa: N818 - an answer to should_stop, not an error
    """``should_stop`` said so during a prefill."""


@cache
def _workers(_process: int) -> ThreadPoolExecutor:
    """Threads that are kept, since a run takes longer in a new one; a forked process has none of them."""
    return ThreadPoolExecutor(max_workers=MOST_RUNS, thread_name_prefix="gptedge")


def in_worker(run: Callable[[], T], options: Any, should_stop: ShouldStop) -> T:
    """Return what ``run`` returns in one of the threads that are kept: see :func:`run_in`."""
    return run_in(_workers(os.getpid()), run, options, should_stop)


def run_in(pool: ThreadPoolExecutor, run: Callable[[], T], options: Any, should_stop: ShouldStop) -> T:
    """Run onnxruntime, with these run options, in a thread of ``pool`` while this one waits.

    onnxruntime hears no signal: Ctrl-C ends the run, and so do ``should_stop``, which raises :class:`Stopped`, and what
    it raises itself. A Ctrl-C while the run is handed over, or a second one, does not wait for that end: ``run`` must
    hold all that it reads and writes.
    """
    running = None
    try:
        running = pool.submit(run)
        while not should_stop():
            if wait([running], timeout=POLL_S).done:
                return running.result()
        raise Stopped
    except BaseException:
        options.terminate = True
        if running:
            wait([running])
        raise


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
