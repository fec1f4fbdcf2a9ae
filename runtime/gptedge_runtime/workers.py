"""Threads in which onnxruntime runs while the main thread hears signals; a run takes longer in a new one.

A Ctrl-C comes between any two instructions of the main thread. In ``concurrent.futures`` and ``threading`` it may leave
a lock taken that the other thread then waits for, for ever. What is used here does its work in one instruction.
"""

import atexit
import os
from _thread import allocate_lock, start_new_thread
from collections import deque
from collections.abc import Callable
from functools import cache
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from .limits import ShouldStop, Stopped

T = TypeVar("T")

POLL_S = 0.02


class Call(Generic[T]):
    """What a worker runs, and what came of it."""

    def __init__(self, run: Callable[[], T]) -> None:
        self._run, self._results = run, list[T]()
        self._error: BaseException | None = None
        self._has_ended, self._end = False, allocate_lock()
        self._end.acquire()

    def __call__(self) -> None:
        """Run, in the worker's thread."""
        try:
            self._results.append(self._run())
        except BaseException as error:
            self._error = error
        self._has_ended = True
        self._end.release()

    def wait(self) -> bool:
        """Return whether it has ended, after ``POLL_S`` at most."""
        return self._has_ended or self._end.acquire(timeout=POLL_S)

    def result(self) -> T:
        """Return what the run returns, or raise what it raises, once it has ended."""
        while not self.wait():
            pass
        if self._error is None:
            return self._results[0]
        try:
            raise self._error
        finally:
            self._error = None  # its frames lead back here


class Worker:
    """A thread that runs one call after the other, until the process ends: then it ends the last one first."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._end = allocate_lock()
        self._end.acquire()
        start_new_thread(self._serve, ())
        atexit.register(self._finish, os.getpid())

    def start(self, run: Callable[[], T]) -> Call[T]:
        """Run this behind what was started before."""
        call = Call(run)
        self._calls.put(call)
        return call

    def _serve(self) -> None:
        for call in iter(self._calls.get, None):
            call()
            del call  # and what it holds
        self._end.release()

    def _finish(self, process: int) -> None:
        if os.getpid() == process:  # a forked one has no such thread
            self._calls.put(None)
            self._end.acquire()


@cache
def _idle(_process: int) -> deque[Worker]:
    return deque()


def in_worker(run: Callable[[], T], options: Any, should_stop: ShouldStop) -> T:
    """Return what ``run`` returns in a worker that has nothing else to do: see :func:`run_in`."""
    idle = _idle(os.getpid())
    try:
        worker = idle.pop()
    except IndexError:
        worker = Worker()

    def run_and_rest() -> T:
        try:
            return run()
        finally:
            idle.append(worker)

    return run_in(worker, run_and_rest, options, should_stop)


def run_in(worker: Worker, run: Callable[[], T], options: Any, should_stop: ShouldStop) -> T:
    """Run onnxruntime, with these run options, in a worker's thread while this one waits.

    onnxruntime hears no signal: Ctrl-C ends the run, and so do ``should_stop``, which raises :class:`Stopped`, and what
    it raises itself. A Ctrl-C while the run is handed over, or a second one, does not wait for that end: ``run`` must
    hold all that it reads and writes.
    """
    call = None
    try:
        call = worker.start(run)
        while not should_stop():
            if call.wait():
                return call.result()
        raise Stopped
    except BaseException:
        options.terminate = True
        while call and not call.wait():
            pass
        raise
