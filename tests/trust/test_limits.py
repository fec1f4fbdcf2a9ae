"""Time, threads and memory: a graph that never ends is ended, whatever part of it runs."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from gptedge_runtime import GptEdgeError, InputError, TimeLimitError, limits, load
from gptedge_runtime.evaluate import evaluate
from gptedge_runtime.verify import verify
from onnx import TensorProto, helper

Edit = Callable[[Callable[[dict[str, Any]], object]], Path]
BIN = Path(sys.executable).parent


def never_ending(path: Path, *, past: int) -> None:
    """Put a loop before the graph's logits that runs 2**62 times once the first position is at least ``past``."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    for node in graph.node:
        node.output[:] = ["true_logits" if name == "logits" else name for name in node.output]
    body = helper.make_graph(
        [helper.make_node("Identity", ["go_on"], ["goes_on"]), helper.make_node("Identity", ["x"], ["y"])],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
        ],
    )
    numbers = {"trap_past": past, "trap_steps": 2**62}
    graph.initializer.extend(helper.make_tensor(name, TensorProto.INT64, [], [n]) for name, n in numbers.items())
    positions = "position_ids" if any(i.name == "position_ids" for i in graph.input) else "input_ids"
    graph.node.extend(
        [
            helper.make_node("ReduceMin", [positions], ["trap_first"], keepdims=0),
            helper.make_node("GreaterOrEqual", ["trap_first", "trap_past"], ["trap_sprung"]),
            helper.make_node("Loop", ["trap_steps", "trap_sprung", "true_logits"], ["logits"], body=body),
        ]
    )
    path.write_bytes(model.SerializeToString())


def sign(manifest: dict[str, Any]) -> None:
    """Sign the files as they are."""


def test_an_endless_graph_is_ended_when_it_is_loaded(bundle: Path, edit: Edit) -> None:
    never_ending(bundle / "onnx/decode.onnx", past=0)
    with pytest.raises(TimeLimitError, match=r"not done after 0\.3 seconds"):
        load(edit(sign), timeout_s=0.3)


@pytest.fixture
def trapped(bundle: Path, edit: Edit) -> Path:
    """Reads any prompt, and never ends once a token follows; the probe at load is at position 31, so it is spared."""
    path = bundle / "onnx/decode.onnx"
    never_ending(path, past=3)
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer.append(helper.make_tensor("trap_end", TensorProto.INT64, [], [31]))
    loop = model.graph.node.pop()
    less = helper.make_node("Less", ["trap_first", "trap_end"], ["trap_before_end"])
    both = helper.make_node("And", ["trap_sprung", "trap_before_end"], ["trap"])
    loop.input[1] = "trap"
    model.graph.node.extend([less, both, loop])
    path.write_bytes(model.SerializeToString())
    return edit(sign)


def test_an_endless_decode_step_is_ended_and_the_object_goes_on(trapped: Path) -> None:
    with load(trapped) as gpt:
        for _ in range(2):
            gpt._session.timeout_s = 0.5
            with pytest.raises(TimeLimitError):
                gpt.generate_ids([1, 2, 3], max_new_tokens=2)
            gpt._session.timeout_s = None  # a machine that is busy may need longer for what ends
            assert len(gpt.generate_ids([1, 2, 3], max_new_tokens=1)) == 1


def test_should_stop_ends_an_endless_step_of_a_bundle_that_is_not_trusted(trapped: Path) -> None:
    asked = iter(range(10**9))
    with load(trapped, timeout_s=600) as gpt:
        assert len(gpt.generate_ids([1, 2, 3], max_new_tokens=5, should_stop=lambda: next(asked) > 100)) <= 1
        assert len(gpt.generate_ids([1, 2, 3], max_new_tokens=1)) == 1


@pytest.mark.parametrize("graph", ["forward", "model"])
def test_verify_ends_an_endless_graph(bundle: Path, edit: Edit, graph: str) -> None:
    never_ending(bundle / f"onnx/{graph}.onnx", past=0)
    with pytest.raises(TimeLimitError):
        verify(edit(sign), timeout_s=1)


def test_the_command_ends_an_endless_graph_with_one_line(bundle: Path, edit: Edit) -> None:
    never_ending(bundle / "onnx/decode.onnx", past=0)
    command: list[str | Path] = [BIN / "gptedge", "generate", edit(sign), "hi", "--timeout-s", "0.5"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().startswith("error: not done after 0.5 seconds: ")


def test_ctrl_c_ends_an_endless_graph(bundle: Path, edit: Edit) -> None:
    never_ending(bundle / "onnx/decode.onnx", past=0)
    code = """
import sys, threading, _thread, gptedge_runtime
done = threading.Event()
def press() -> None:  # as a person does, until it is heard: what Python runs between two statements may swallow one
    while not done.wait(1):
        _thread.interrupt_main()
threading.Thread(target=press, daemon=True).start()
try:
    gptedge_runtime.load(sys.argv[1])
except KeyboardInterrupt:
    done.set()
    print("interrupted")
"""
    command = [sys.executable, "-c", code, str(edit(sign))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.stdout, done.stderr) == ("interrupted\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c_in_a_long_prefill_leaves_130_and_one_line(bundle: Path, edit: Edit) -> None:
    never_ending(bundle / "onnx/decode.onnx", past=0)
    command: list[str | Path] = [BIN / "gptedge", "generate", edit(sign), "hi"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        while "onnxruntime" not in Path(f"/proc/{running.pid}/maps").read_text():
            assert running.poll() is None
        time.sleep(2)  # the session is open by then, and the graph runs
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=300)
    assert (running.returncode, out, err) == (130, b"", b"error: interrupted\n")


def test_a_time_limit_that_is_not_reached_changes_nothing(bundles: Path, eager: Any) -> None:
    with load(bundles / "tiny", timeout_s=600) as gpt:
        assert gpt.generate_ids(eager.prompts[3], max_new_tokens=30) == eager.new[3][:30]
        np.testing.assert_allclose(gpt.logits(eager.ids), eager.logits, rtol=0, atol=eager.atol)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), True, "1", 10**400])
def test_a_time_limit_out_of_range_is_refused(bundles: Path, timeout_s: Any) -> None:
    with pytest.raises(InputError, match=r"timeout_s is .*: give a number of seconds above 0"):
        load(bundles / "tiny", timeout_s=timeout_s)


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("max 100000", None), ("50000 100000", 1), ("100000 100000", 1), ("150000 100000", 2), ("x", None), ("", None)],
)
def test_a_containers_quota_is_whole_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, cpus: int | None
) -> None:
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(limits, "CPU_QUOTA", tmp_path / "cpu.max")
    assert limits._read_quota() == cpus
    assert limits.count_threads(None) <= (cpus or 10_000)


OUT_OF_MEMORY = """
import resource, sys
from pathlib import Path
from gptedge_runtime import OutOfMemoryError, load

with load(sys.argv[1]) as gpt:
    before = gpt.generate_ids([1, 2], max_new_tokens=3)
    old = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), old[1]))
    for call in (gpt.logits, gpt.generate_ids):
        try:
            call([[1] * 32] * 40_000)
        except OutOfMemoryError as error:
            print(error)
    resource.setrlimit(resource.RLIMIT_AS, old)
    assert gpt.generate_ids([1, 2], max_new_tokens=3) == before
"""


def test_a_batch_that_no_memory_holds_is_one_documented_error(bundles: Path) -> None:
    pytest.importorskip("resource")
    # in a process of its own: room that other tests have given back would hold the batch
    command = [sys.executable, "-c", OUT_OF_MEMORY, str(bundles / "tiny")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(re.findall("^out of memory: ", done.stdout, re.MULTILINE)) == 2


def test_a_graph_that_asks_for_terabytes_is_one_documented_error(bundle: Path, edit: Edit) -> None:
    path = bundle / "onnx/decode.onnx"
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        node.output[:] = ["true_logits" if name == "logits" else name for name in node.output]
    model.graph.initializer.append(helper.make_tensor("trap_size", TensorProto.INT64, [1], [10**13]))
    model.graph.node.extend(
        [
            helper.make_node("ConstantOfShape", ["trap_size"], ["trap_zeros"]),
            helper.make_node("ReduceSum", ["trap_zeros"], ["trap_zero"], keepdims=0),
            helper.make_node("Add", ["true_logits", "trap_zero"], ["logits"]),
        ]
    )
    path.write_bytes(model.SerializeToString())
    with pytest.raises(GptEdgeError):
        load(edit(sign))


def test_what_the_reader_of_a_stream_takes_for_itself_does_not_count(bundles: Path) -> None:
    with load(bundles / "tiny", timeout_s=600) as gpt:
        gpt._session.timeout_s = 1
        stream = gpt.stream("hello", max_new_tokens=5)
        for _ in stream:
            time.sleep(0.4)
        assert len(stream.token_ids) == 5


def test_a_time_limit_holds_for_all_windows_of_an_evaluation_together(bundles: Path) -> None:
    with load(bundles / "tiny", timeout_s=600) as gpt:
        gpt.timeout_s = 1e-3
        with pytest.raises(TimeLimitError):
            evaluate(gpt, "hello " * 1000)
