"""The graph for CUDA and the session around it.

Each fact is shown on the CPU, which runs the same graph by the same code, and on a GPU where there is one. Bounds are
those of docs/cuda.md: float32 four times the CPU's, float16 a fiftieth of the largest logit, bfloat16, for which the
CPU has no kernels, eight times that.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from gptedge_runtime import GPT, BundleError, InputError, ProviderError, Sampling, load
from gptedge_runtime.bundle import open_bundle
from gptedge_runtime.cuda import CUDA, HALF_ERROR, CudaSession, _gpu
from gptedge_runtime.limits import never
from gptedge_runtime.provider import open_session, why_not_cuda
from gptedge_runtime.session import Session
from gptedge_runtime.tokenizer import load_tokenizer
from gptedge_runtime.verify import verify

from ..signing import sign

OpenOn = Callable[[str, str], GPT]

MIN_TOP1 = {"fp16": 0.98, "bf16": 0.9}
MAX_ERROR_FP16 = 0.02  # of the largest logit
SHAPES_ONLY = {
    "Shape",
    "Concat",
    "Unsqueeze",
    "Squeeze",
    "Gather",
    "Slice",
    "Cast",
    "Mul",
    "Add",
    "Sub",
    "Div",
    "Range",
}
"""Operators that ONNX Runtime may compute on the CPU, since they make up shapes."""

PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
EVERYWHERE = pytest.mark.parametrize(
    ("precision", "device"),
    [
        ("fp32", "cpu"),
        ("fp16", "cpu"),
        *(pytest.param(precision, "cuda", marks=pytest.mark.cuda) for precision in ("fp32", "fp16", "bf16")),
    ],
)

without_gpu = pytest.mark.skipif(why_not_cuda() is None, reason="there is a GPU")

WRONG_IDS = [[-1], [270], [1, 2**31], [[1, 2], [3, -1]], []]


def bound(precision: str, eager: Any) -> float:
    """Of max|d logits|, beside the model."""
    return float(eager.atol) * (4 if precision == "fp32" else HALF_ERROR[precision])


def logits_step_by_step(gpt: GPT, ids: Any) -> Any:
    """Logits (B, T, V): the first token in a prefill, each other one in a step."""
    cache = gpt._session.new_cache(*ids.shape)
    cache.prefill(ids[:, :1].tolist(), never)
    parts = [cache.logits.copy()]
    for place in range(1, ids.shape[1]):
        cache.decode(ids[:, place].tolist(), never)
        parts.append(cache.logits.copy())
    return np.stack(parts, axis=1)


@EVERYWHERE
def test_logits_of_a_prefill_are_within_the_bound_at_every_length(
    open_on: OpenOn, device: str, eager: Any, precision: str
) -> None:
    gpt = open_on(precision, device)
    for length in range(1, eager.ids.shape[1] + 1):
        logits = gpt.logits(eager.ids[:, :length])
        assert np.abs(logits - eager.logits[:, :length]).max() <= bound(precision, eager)


@EVERYWHERE
def test_logits_of_steps_are_within_the_bound_at_every_length(
    open_on: OpenOn, device: str, eager: Any, precision: str
) -> None:
    logits = logits_step_by_step(open_on(precision, device), eager.ids)
    assert np.abs(logits - eager.logits).max() <= bound(precision, eager)


def test_outliers_of_the_residual_stream_do_not_overflow(cuda_bundles: Path, device: str) -> None:
    """GPT-2's reach thousands, whose squares float16 does not hold."""
    bundle, answers = open_bundle(cuda_bundles / "outliers"), np.load(cuda_bundles / "outliers.npz")
    with GPT(load_tokenizer(bundle), CudaSession(bundle, threads=1, device=device)) as gpt:
        difference = np.abs(gpt.logits(answers["ids"]) - answers["logits"]).max()
    assert difference <= MAX_ERROR_FP16 * np.abs(answers["logits"]).max()


@pytest.mark.parametrize(
    ("precision", "device"),
    [("fp16", "cpu"), *(pytest.param(precision, "cuda", marks=pytest.mark.cuda) for precision in MIN_TOP1)],
)
def test_16_bits_prefer_the_same_tokens(open_on: OpenOn, eager: Any, precision: str, device: str) -> None:
    same = open_on(precision, device).logits(eager.ids).argmax(-1) == eager.logits.argmax(-1)
    assert same.mean() >= MIN_TOP1[precision]


@pytest.mark.parametrize("index", range(7))
def test_fp32_ids_are_the_models_below_at_and_beyond_the_context(
    open_on: OpenOn, device: str, eager: Any, index: int
) -> None:
    new_ids = open_on("fp32", device).generate_ids(eager.prompts[index], max_new_tokens=72)
    assert new_ids == eager.new[index]


def test_a_ragged_batch_has_the_ids_of_its_rows(open_on: OpenOn, device: str, eager: Any) -> None:
    new_ids = open_on("fp32", device).generate_ids(eager.prompts, max_new_tokens=40)
    assert new_ids == [ids[:40] for ids in eager.new]


@EVERYWHERE
def test_the_most_likely_ids_come_from_the_device_without_their_logits(
    open_on: OpenOn, device: str, eager: Any, precision: str
) -> None:
    cache = open_on(precision, device)._session.new_cache(2, 8)
    cache.prefill(eager.ids[:, :3].tolist(), never)
    cache.decode(eager.ids[:, 3].tolist(), never)
    best = cache.best_ids([0, 1])
    assert not cache._step._binding.is_read
    assert best == cache.logits.argmax(axis=1).tolist()


def test_drawn_ids_are_those_of_the_logits(open_on: OpenOn, device: str, eager: Any) -> None:
    new_ids = open_on("fp32", device).generate_ids(
        eager.prompts[2], max_new_tokens=40, sampling=Sampling(top_k=1, seed=1)
    )
    assert new_ids == eager.new[2][:40]


@EVERYWHERE
def test_weights_that_are_not_finite_are_refused_when_they_show(
    cuda_bundles: Path, tmp_path: Path, device: str, precision: str
) -> None:
    path = shutil.copytree(cuda_bundles / precision, tmp_path / "bundle")
    data = path / "onnx/model.onnx_data"
    data.write_bytes(b"\xff" * data.stat().st_size)  # every float is NaN
    bundle = open_bundle(sign(path))
    with GPT(load_tokenizer(bundle), CudaSession(bundle, threads=1, device=device)) as gpt:
        cache = gpt._session.new_cache(1, 4)
        cache.prefill([[1]], never)
        cache.decode([2], never)
        with pytest.raises(BundleError, match="not finite"):
            cache.best_ids([0])


@pytest.mark.parametrize("token_ids", WRONG_IDS)
def test_ids_are_checked_before_the_device_sees_any(
    open_on: OpenOn, device: str, monkeypatch: pytest.MonkeyPatch, token_ids: Any
) -> None:
    """CUDA's Gather checks no bounds: what reaches it reads anywhere."""
    gpt = open_on("fp32", device)

    def refuse(*_: object) -> None:
        raise AssertionError("the device was reached")

    for name in ("bind", "run", "new_key_values"):
        monkeypatch.setattr(gpt._session, name, refuse)
    for call in (gpt.logits, gpt.generate_ids):
        with pytest.raises(InputError):
            call(token_ids)


@PRECISIONS
def test_a_bundle_with_the_graph_is_verified_and_runs_on_the_cpu(cuda_bundles: Path, precision: str) -> None:
    done = verify(cuda_bundles / precision)
    skipped = ("decode_cuda",) if precision == "bf16" and why_not_cuda() else ()
    assert (done.graphs, done.skipped) == (5 - len(skipped), skipped)
    with load(cuda_bundles / precision, provider="cpu") as gpt:
        assert gpt._session.graph == "decode"


@PRECISIONS
def test_the_weights_are_stored_once(cuda_bundles: Path, bundles: Path, precision: str) -> None:
    with_graph = (cuda_bundles / precision / "onnx/model.onnx_data").stat().st_size
    share = 1 if precision == "fp32" else 0.6
    assert with_graph <= share * (bundles / "tiny/onnx/model.onnx_data").stat().st_size


@pytest.mark.parametrize(("side", "index", "key", "value"), [
    ("inputs", 0, "dtype", "int32"), ("inputs", -1, "dtype", "float64"), ("outputs", 1, "name", "other"),
])  # fmt: skip
def test_a_tensor_that_is_not_the_graphs_is_refused(
    cuda_bundles: Path, tmp_path: Path, side: str, index: int, key: str, value: str
) -> None:
    path = shutil.copytree(cuda_bundles / "fp16", tmp_path / "bundle")
    manifest = json.loads((path / "manifest.json").read_text("utf-8"))
    manifest["graphs"]["decode_cuda"][side][index][key] = value
    (path / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(BundleError, match=r"decode_cuda\.onnx: (input|output) .* is .*, not "):
        CudaSession(open_bundle(path), threads=1, device="cpu")


def test_a_bundle_without_the_graph_says_how_to_get_it(bundles: Path) -> None:
    with pytest.raises(ProviderError, match="export it with --cuda"):
        open_session(open_bundle(bundles / "tiny"), provider="cuda", device="cuda", threads=1, timeout_s=None)


def test_auto_runs_a_bundle_without_the_graph_on_the_cpu(bundles: Path) -> None:
    session = open_session(open_bundle(bundles / "tiny"), provider="auto", device="cuda", threads=1, timeout_s=None)
    assert (type(session), session.provider) == (Session, "cpu")
    assert session.why_not_cuda == "the bundle has no graph for it: export it with --cuda, or choose cpu"


@without_gpu
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_session_that_onnxruntime_opens_elsewhere_is_refused(
    cuda_bundles: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = open_bundle(cuda_bundles / "fp32")
    with pytest.raises(ProviderError, match="provider cuda: onnxruntime opened the bundle on CPUExecutionProvider"):
        open_session(bundle, provider="cuda", device="cuda", threads=1, timeout_s=None)
    assert capfd.readouterr() == ("", "")


@without_gpu
@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize(
    ("precision", "reason"), [("fp32", "CPUExecutionProvider"), ("bf16", r"refuses onnx/decode_cuda.onnx \(NotImpl")]
)
def test_auto_takes_the_cpu_where_the_session_does_not_open_on_the_gpu(
    cuda_bundles: Path, precision: str, reason: str
) -> None:
    """At bf16 as where onnxruntime-gpu lacks kernels: the CPU has none."""
    bundle = open_bundle(cuda_bundles / precision)
    session = open_session(bundle, provider="auto", device="cuda", threads=1, timeout_s=None)
    assert (type(session), session.provider) == (Session, "cpu")
    assert re.search(reason, session.why_not_cuda or "")


@pytest.mark.cuda
@pytest.mark.parametrize("provider", ["auto", "cuda"])
def test_the_gpu_is_taken_and_told(cuda_bundles: Path, provider: str) -> None:
    command = [sys.executable, "-m", "gptedge_runtime", "generate", str(cuda_bundles / "fp16"), "hello", "--json"]
    done = subprocess.run([*command, "--provider", provider], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["provider"] == "cuda"
    assert done.stderr == ("note: runs on cuda\n" if provider == "auto" else "")


@pytest.mark.cuda
def test_the_session_runs_where_it_says(open_on: OpenOn) -> None:
    assert open_on("fp16", "cuda")._session._session.get_providers()[0] == CUDA


@pytest.mark.cuda
@PRECISIONS
def test_nothing_but_shapes_is_computed_on_the_cpu(cuda_bundles: Path, precision: str) -> None:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    path = cuda_bundles / precision / "onnx/decode_cuda.onnx"
    session = onnxruntime.InferenceSession(path, options, providers=[CUDA, "CPUExecutionProvider"])
    parts = session.get_provider_graph_assignment_info()
    on_cpu = {node.op_type for part in parts if part.ep_name != CUDA for node in part.get_nodes()}
    assert on_cpu <= SHAPES_ONLY


@EVERYWHERE
def test_steps_that_are_not_captured_have_the_same_ids(
    cuda_bundles: Path, open_on: OpenOn, device: str, eager: Any, precision: str
) -> None:
    bundle = open_bundle(cuda_bundles / precision)
    session = CudaSession(bundle, threads=1, device=device)
    session.max_kept_bytes = 0
    with GPT(load_tokenizer(bundle), session) as plain:
        for prompt in eager.prompts[:5]:
            captured = open_on(precision, device).generate_ids(prompt, max_new_tokens=40)
            assert captured == plain.generate_ids(prompt, max_new_tokens=40)


def test_a_cache_that_is_closed_serves_the_next_of_its_batch_size(open_on: OpenOn, device: str) -> None:
    session = open_on("fp32", device)._session
    first = session.new_cache(5, 8)
    second = session.new_cache(5, 8)
    first.close()
    assert session.new_cache(6, 8) not in (first, second)
    assert session.new_cache(5, 8) is first


def test_threads_at_once_have_the_ids_of_one_after_the_other(open_on: OpenOn, device: str, eager: Any) -> None:
    gpt = open_on("fp32", device)
    with ThreadPoolExecutor(max_workers=4) as pool:
        jobs = [pool.submit(gpt.generate_ids, prompt, max_new_tokens=40) for prompt in eager.prompts * 3]
    assert [job.result() for job in jobs] == [ids[:40] for ids in eager.new * 3]


def test_a_step_that_ctrl_c_has_left_alone_changes_no_later_text(open_on: OpenOn, device: str, eager: Any) -> None:
    gpt = open_on("fp32", device)
    session: Any = gpt._session
    for index in (1, 2):
        cache = session.new_cache(1, 8)
        cache.prefill([eager.prompts[3][:4]], never)
        cache.decode([5], never)
        binding = cache._step._binding
        session.read_logits(binding)
        _gpu().start(partial(time.sleep, 0.1))
        _gpu().start(partial(session._run, binding, binding.options))
        cache.close()
        assert gpt.generate_ids(eager.prompts[index], max_new_tokens=4) == eager.new[index][:4]


@pytest.mark.parametrize(("precision", "n_runs"), [("fp32", 2), ("fp16", 1)])
def test_16_bits_read_more_of_a_prompt_at_once(
    open_on: OpenOn, device: str, eager: Any, monkeypatch: pytest.MonkeyPatch, precision: str, n_runs: int
) -> None:
    session = open_on(precision, device)._session
    runs, run_long = [], session.run_long

    def counted(*arguments: Any) -> None:
        runs.append(arguments)
        run_long(*arguments)

    monkeypatch.setattr(session, "run_long", counted)
    cache = session.new_cache(40, eager.ids.shape[1])
    cache.prefill(np.tile(eager.ids, (20, 1)).tolist(), never)  # 1,280 tokens
    assert len(runs) == n_runs
    assert np.abs(cache.logits[:2] - eager.logits[:, -1]).max() <= bound(precision, eager)
