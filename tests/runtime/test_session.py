"""The session: what it refuses at load, and how a long run ends early."""

import os
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gptedge_runtime import GPT, BundleError, InputError, load
from gptedge_runtime.cache import split_rows
from gptedge_runtime.limits import Stopped
from gptedge_runtime.session import Session, prefill_feeds

Edit = Callable[[Callable[[dict[str, Any]], object]], Path]


def long_run(session: Session) -> tuple[Any, Any]:
    """A binding that works for a second or so, and its logits, which are NaN until it has ended."""
    batch, length = 3000, 32
    ids = np.zeros((batch, length), np.int64)
    logits = np.full((batch, 1, session.model.vocab_size), np.nan, np.float32)
    feeds = prefill_feeds(ids, np.full(batch, length), np.full((batch, 1), length - 1))
    return session.bind(feeds, session.new_key_values(batch, length), logits), logits


def test_a_stopped_run_ends_before_its_result_and_the_session_goes_on(tiny: GPT, eager: Any) -> None:
    binding, logits = long_run(tiny._session)
    asked = iter([False, True])
    with pytest.raises(Stopped):
        tiny._session.run_long(binding, lambda: next(asked))
    assert np.isnan(logits).all()
    assert tiny.generate_ids(eager.prompts[1], max_new_tokens=4) == eager.new[1][:4]


def test_ctrl_c_ends_a_run_before_its_result(tiny: GPT, eager: Any) -> None:
    binding, logits = long_run(tiny._session)

    def interrupt() -> bool:
        signal.raise_signal(signal.SIGINT)
        return False

    with pytest.raises(KeyboardInterrupt):
        tiny._session.run_long(binding, interrupt)
    assert np.isnan(logits).all()
    assert tiny.generate_ids(eager.prompts[1], max_new_tokens=4) == eager.new[1][:4]


def test_a_binding_holds_what_it_reads_and_writes(tiny: GPT) -> None:
    """A run that nobody waits for any more would else write to memory that others have by then."""
    key_values = tiny._session.new_key_values(1, 4)
    logits = np.empty((1, 1, tiny._session.model.vocab_size), np.float32)
    feeds = prefill_feeds(np.zeros((1, 4), np.int64), np.array([4]), np.array([[3]]))
    arrays = [weakref.ref(array) for array in (*feeds.values(), *key_values, logits)]
    binding = tiny._session.bind(feeds, key_values, logits)
    del key_values, logits, feeds
    assert all(array() is not None for array in arrays)
    del binding


def test_a_long_run_that_nobody_stops_has_a_result(tiny: GPT) -> None:
    binding, logits = long_run(tiny._session)
    tiny._session.run_long(binding, lambda: False)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_prompt_read_in_chunks_leaves_the_logits_of_one_read_at_once(
    bundles: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within what roundings to 8 bits turn: 2 % of the largest logit were seen, 5 % are the bound at export."""
    ids, logits = [[7 * i % 250 for i in range(30)]], []
    with load(bundles / name) as gpt:
        for size in (30, 8):
            monkeypatch.setattr("gptedge_runtime.cache.CHUNK_TOKENS", size)
            cache = gpt._session.new_cache(1, 32)
            cache.prefill(ids, lambda: False)
            assert cache.length == 30
            logits.append(cache.logits.copy())
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=0.05 * float(np.abs(logits[0]).max()))


@pytest.mark.parametrize("name", ["tiny", "int8"])
def test_keys_and_values_have_the_bits_of_the_precision(bundles: Path, name: str) -> None:
    with load(bundles / name) as gpt:
        cache = gpt._session.new_key_values(2, 8)
        assert {array.itemsize for array in cache} == {1 if name == "int8" else 4}


@pytest.mark.parametrize(
    ("lengths", "parts"),
    [
        ([1], [(0, 1)]),
        ([5000], [(0, 1)]),
        ([512, 512, 1], [(0, 2), (2, 3)]),
        ([2, 1024, 3, 3], [(0, 1), (1, 2), (2, 4)]),
        ([1] * 1025, [(0, 1024), (1024, 1025)]),
    ],
)
def test_rows_are_cut_so_that_padding_counts_as_tokens(lengths: list[int], parts: list[tuple[int, int]]) -> None:
    assert [(part.start, part.stop) for part in split_rows(lengths, 1024)] == parts


@pytest.mark.parametrize("field", ["n_layers", "n_heads", "emb_dim", "vocab_size", "context_length"])
def test_sizes_that_are_not_the_graphs_are_refused_at_load(edit: Edit, field: str) -> None:
    path = edit(lambda manifest: manifest["model"].update({field: 2 * manifest["model"][field]}))
    with pytest.raises(BundleError):
        load(path)


@pytest.mark.parametrize("part", ["inputs", "outputs"])
@pytest.mark.parametrize(("key", "value"), [("name", "other"), ("dtype", "float16"), ("shape", ["batch_size", 7])])
@pytest.mark.parametrize("index", [0, -1])
def test_a_tensor_that_is_not_the_graphs_is_refused_at_load(
    edit: Edit, part: str, key: str, value: Any, index: int
) -> None:
    path = edit(lambda manifest: manifest["graphs"]["decode"][part][index].update({key: value}))
    with pytest.raises(BundleError, match=r"(input|output) .* is .*, not "):
        load(path)


@pytest.mark.parametrize("part", ["inputs", "outputs"])
def test_a_missing_tensor_is_refused_at_load(edit: Edit, part: str) -> None:
    with pytest.raises(BundleError, match=r"(input|output) .* is .*, not "):
        load(edit(lambda manifest: manifest["graphs"]["decode"][part].pop()))


def test_the_graph_itself_is_compared_with_the_manifest(edit: Edit) -> None:
    path = edit(lambda manifest: manifest["graphs"]["decode"].update(path="onnx/forward.onnx"))
    with pytest.raises(BundleError, match=r"onnx/forward\.onnx: input .* is missing, not"):
        load(path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"<html>not found</html>"])
def test_a_graph_that_onnxruntime_cannot_read_is_one_line(
    bundle: Path, edit: Edit, content: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    (bundle / "onnx/decode.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"refuses onnx/decode\.onnx") as caught:
        load(edit(lambda manifest: None))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_weights_that_are_not_finite_are_refused_when_they_show(bundle: Path, edit: Edit) -> None:
    data = bundle / "onnx/model.onnx_data"
    data.write_bytes(b"\xff" * data.stat().st_size)  # every float32 is NaN
    with load(edit(lambda manifest: None)) as gpt, pytest.raises(BundleError, match="not finite"):
        gpt.generate_ids([1], max_new_tokens=1)


def test_weights_cut_short_are_refused_at_load(bundle: Path, edit: Edit) -> None:
    data = bundle / "onnx/model.onnx_data"
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(BundleError, match="refuses"):
        load(edit(lambda manifest: None))


@pytest.mark.parametrize("value", [None, "0", "1"])
@pytest.mark.parametrize("name", ["tiny", "int8"])
def test_the_environment_is_afterwards_as_it_was(
    bundles: Path, name: str, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a session that somebody makes later would attend in another way."""
    monkeypatch.delenv("ORT_GQA_DISABLE_FLASH_ATTENTION", raising=False)
    if value is not None:
        monkeypatch.setenv("ORT_GQA_DISABLE_FLASH_ATTENTION", value)
    load(bundles / name).close()
    assert os.environ.get("ORT_GQA_DISABLE_FLASH_ATTENTION") == value


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_threads_out_of_range_are_refused(bundles: Path, threads: Any) -> None:
    with pytest.raises(InputError, match="threads is"):
        load(bundles / "tiny", threads=threads)


@pytest.mark.parametrize("threads", [1, 2, 10_000])
def test_ids_do_not_depend_on_threads(bundles: Path, eager: Any, threads: int) -> None:
    with load(bundles / "tiny", threads=threads) as gpt:
        assert gpt.generate_ids(eager.prompts[4], max_new_tokens=40) == eager.new[4][:40]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system does not tell allowed CPUs")
def test_threads_are_capped_at_the_cpus_allowed(bundles: Path) -> None:
    from gptedge_runtime.limits import count_threads

    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert count_threads(None) == count_threads(64) == 1
    finally:
        os.sched_setaffinity(0, allowed)
