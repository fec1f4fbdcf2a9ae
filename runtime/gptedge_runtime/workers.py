"""Threads in which onnxruntime runs while the main thread hears signals; a run takes longer in a new one.

A Ctrl-C comes between any two instructions of the main thread. In ``concurrent.futures`` and ``threading`` it may leave
a lock taken that the other thread then waits for, for ever. What is used here does its work in one instruction.
"""

import atexit
import os
import time
from _thread import allocate_lock, start_new_thread
from collections import deque
from collections.abc import Callable
from functools import cache
from queue import SimpleQueue
from threading import current_thread
from typing import Any, Generic, TypeVar

from .errors import InputError, OutOfMemoryError
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
        try:
            start_new_thread(self._serve, ())
        except RuntimeError as error:
            raise no_thread() from error
        _of(os.getpid()).all.append(self)

    def start(self, run: Callable[[], T]) -> Call[T]:
        """Run this behind what was started before. Raises :class:`InputError` where Python is ending."""
        if _of(os.getpid()).have_ended:
            while is_cut_off():
                time.sleep(1)  # until it is
            raise InputError("Python is ending, and runs no bundle any more: use it before")
        call = Call(run)
        self._calls.put(call)
        return call

    def end(self) -> None:
        """Return when what was started has ended, and start nothing more."""
        self._calls.put(None)
        self._end.acquire()

    def _serve(self) -> None:
        for call in iter(self._calls.get, None):
            call()
            del call  # and what it holds
        self._end.release()


class _Workers:
    """Those of a process; a forked one has none of the threads."""

    def __init__(self) -> None:
        self.all: list[Worker] = []
        self.idle: deque[Worker] = deque()
        self.have_ended = False


@cache
def _of(_process: int) -> _Workers:
    return _Workers()


@atexit.register
def _end_all() -> None:
    workers = _of(os.getpid())
    workers.have_ended = True
    for worker in workers.all:
        worker.end()


def no_thread() -> OutOfMemoryError:
    """Return what to say where the system starts no further thread."""
    return OutOfMemoryError("no thread can be started: end other programs, or raise the limit (ulimit -u, ulimit -v)")


def is_cut_off() -> bool:
    """Whether Python may end this thread wherever it is; within onnxruntime that would abort the process."""
    return current_thread().daemon


def in_worker(run: Callable[[], T], options: Any, should_stop: ShouldStop) -> T:
    """Return what ``run`` returns in a worker that has nothing else to do: see :func:`run_in`."""
    idle = _of(os.getpid()).idle
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
