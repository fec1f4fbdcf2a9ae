"""The threads in which onnxruntime runs: what a Ctrl-C does to them, and what they keep."""

import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gptedge_runtime.limits import never
from gptedge_runtime.workers import Worker, in_worker, run_in


def options() -> Any:
    return SimpleNamespace(terminate=False)


def interrupted_at(place: int, call: Callable[[], object]) -> bool:
    """Call with a Ctrl-C before the instruction of this number; whether it came so far."""
    n_left = place

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal n_left
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            n_left -= 1
            if n_left < 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_behind_a_ctrl_c_at_any_instruction_the_next_run_has_its_result() -> None:
    for place in count():
        if not interrupted_at(place, lambda: in_worker(lambda: 1, options(), never)):
            break
        assert in_worker(lambda: 2, options(), never) == 2
    assert place > 50


def test_a_worker_may_be_interrupted_while_it_is_made() -> None:
    for place in count():
        if not interrupted_at(place, lambda: run_in(Worker(), lambda: 1, options(), never)):
            break


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
    meeting = threading.Barrier(300, timeout=60)

    def run(number: int) -> int:
        return in_worker(lambda: number * bool(meeting.wait() + 1), options(), never)

    with ThreadPoolExecutor(300) as pool:
        assert list(pool.map(run, range(300))) == list(range(300))


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


FORKS = """
import os, sys
from types import SimpleNamespace
from gptedge_runtime.limits import never
from gptedge_runtime.workers import in_worker

def run(result):
    return in_worker(lambda: result, SimpleNamespace(), never)

run(1)
child = os.fork()
if child == 0:
    sys.exit(run(3))
sys.exit(run(4) + os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
def test_a_forked_process_has_workers_of_its_own_and_ends() -> None:
    assert subprocess.run([sys.executable, "-c", FORKS], check=False, timeout=60).returncode == 3 + 4
