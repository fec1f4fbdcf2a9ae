"""The threads in which onnxruntime runs: what a Ctrl-C does to them, and what they keep."""

import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gptedge_runtime import OutOfMemoryError
from gptedge_runtime.limits import never
from gptedge_runtime.workers import Worker, in_worker, run_in


def options() -> Any:
    return SimpleNamespace(terminate=False)


RUN = """
from types import SimpleNamespace
from gptedge_runtime.limits import never
from gptedge_runtime.workers import in_worker

def run(result):
    return in_worker(lambda: result, SimpleNamespace(), never)
"""

INTERRUPTS = """
import random, signal

signal.signal(signal.SIGALRM, signal.default_int_handler)
for i in range(2000):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-5, 2e-4))
        while True:
            run(0)
    except KeyboardInterrupt:
        assert run(i) == i
"""

FORKS = """
import os, sys

run(1)
child = os.fork()
if child == 0:
    sys.exit(run(3))
sys.exit(run(4) + os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no such signals, and does not fork")
@pytest.mark.parametrize(("script", "code"), [(INTERRUPTS, 0), (FORKS, 3 + 4)], ids=["wherever Ctrl-C comes", "forked"])
def test_workers_go_on_and_the_process_ends(script: str, code: int) -> None:
    """A forked process has workers of its own. With ``concurrent.futures`` 10 to 60 of these left a lock taken."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", RUN + script]
    done = subprocess.run(command, check=False, timeout=120, capture_output=True)
    assert (done.returncode, done.stderr) == (code, b"")


def test_ctrl_c_while_a_run_is_handed_over_ends_it() -> None:
    class Interrupted(Worker):
        def start(self, run: Callable[[], Any]) -> Any:
            super().start(run)
            raise KeyboardInterrupt

    ended = options()
    with pytest.raises(KeyboardInterrupt):
        run_in(Interrupted(), lambda: None, ended, never)
    assert ended.terminate


def test_runs_at_the_same_time_have_a_worker_each() -> None:
    meeting = threading.Barrier(100, timeout=60)

    def run(number: int) -> int:
        return in_worker(lambda: number * bool(meeting.wait() + 1), options(), never)

    with ThreadPoolExecutor(100) as pool:
        assert list(pool.map(run, range(100))) == list(range(100))


def test_one_run_behind_the_other_is_in_the_same_thread() -> None:
    assert len({in_worker(threading.get_ident, options(), never) for _ in range(100)}) == 1


def test_what_a_run_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        in_worker(lambda: 1 // 0, options(), never)


@pytest.mark.parametrize("fails", [False, True])
def test_a_worker_at_rest_holds_nothing_of_its_last_run(fails: bool) -> None:
    array = np.zeros(1)
    held = weakref.ref(array)

    def run(array: Any = array) -> None:
        if fails:
            raise ValueError(array)

    try:
        in_worker(run, options(), never)
    except ValueError:
        assert fails
    del array, run
    in_worker(lambda: None, options(), never)
    assert held() is None


AT_EXIT = """
import atexit, sys, threading

def bye():
    print(state["gpt"].generate("hello", max_new_tokens=2), end="")

state = {}
atexit.register(bye)  # before the package, so that it runs behind the package's own end
from gptedge_runtime import GptEdgeError, load
state["gpt"] = load(sys.argv[1])
if sys.argv[2] == "daemon":
    atexit.unregister(bye)
    started = threading.Event()
    ids = state["gpt"].generate_ids
    write = lambda: [started.set() for _ in iter(lambda: len(ids([1], max_new_tokens=9)), 0)]
    threading.Thread(target=write, daemon=True).start()
    started.wait()
else:
    state["gpt"].generate("hello")
"""


@pytest.mark.parametrize("who", ["handler", "daemon"])
def test_whoever_generates_while_python_ends_neither_hangs_nor_aborts(bundles: Path, who: str) -> None:
    """A daemon thread that Python ends within onnxruntime ends the process by SIGABRT."""
    command = [sys.executable, "-c", AT_EXIT, str(bundles / "tiny"), who]
    done = subprocess.run(command, check=False, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0
    assert "Python is ending" in done.stderr if who == "handler" else not done.stderr


def test_where_no_thread_can_be_started_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("gptedge_runtime.workers.start_new_thread", refuse)
    with pytest.raises(OutOfMemoryError, match="no thread can be started"):
        Worker()
