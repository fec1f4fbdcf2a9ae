"""prefill.onnx: long prompts of an int8 bundle, each read alone and in parts."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gptedge_runtime import GPT, BundleError, load
from gptedge_runtime import prefill as module
from gptedge_runtime.bundle import open_bundle
from gptedge_runtime.limits import never
from gptedge_runtime.prefill import MIN_TOKENS, Prefill
from gptedge_runtime.session import Session
from numpy.typing import NDArray

PROMPT: list[int] = np.random.default_rng(3).integers(270, size=150).tolist()


@pytest.fixture(scope="module")
def gpt(bundles: Path) -> Iterator[GPT]:
    with load(bundles / "long") as gpt:
        yield gpt


def key_values(gpt: GPT, rows: list[list[int]]) -> list[NDArray[np.int8]]:
    cache = gpt._session.new_cache(len(rows), 160)
    cache.prefill(rows, never)
    return cache.key_values


def test_long_prompts_are_read_with_it(gpt: GPT) -> None:
    graph = gpt._session.prefill_of(MIN_TOKENS + 1)
    assert graph is not None
    buffers = gpt._session.new_key_values(1, 160)
    graph.read(PROMPT[:-1], buffers, never)
    for found, wanted in zip(key_values(gpt, [PROMPT]), buffers, strict=True):
        np.testing.assert_array_equal(found[:, :, : len(PROMPT) - 1], wanted[:, :, : len(PROMPT) - 1])


def test_short_ones_are_not(gpt: GPT) -> None:
    assert gpt._session.prefill_of(MIN_TOKENS) is None


def test_in_parts_it_reads_the_same(gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """To two steps of 8 bits: attention in float32 may add in another order."""
    whole = key_values(gpt, [PROMPT])
    monkeypatch.setattr(module, "PART_TOKENS", 30)
    for found, wanted in zip(key_values(gpt, [PROMPT]), whole, strict=True):
        assert np.abs(found.astype(int) - wanted).max() <= 2


def test_fewer_bits_read_nearly_the_same(gpt: GPT, bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that cuts sums off. Each rounds in its own way; a key or value has 127 steps."""
    graph, buffers = Prefill(open_bundle(bundles / "long"), 1), gpt._session.new_key_values(1, 160)
    whole = key_values(gpt, [PROMPT])
    monkeypatch.setattr(module, "ACTIVATION_MAX", 63)
    graph.read(PROMPT[:-1], buffers, never)
    for found, wanted in zip(buffers, whole, strict=True):
        assert np.abs(found.astype(int) - wanted)[:, :, : len(PROMPT) - 1].max() <= 12


def test_a_batch_has_the_ids_of_single_rows(gpt: GPT) -> None:
    rows = [PROMPT, PROMPT[:3], PROMPT[5:145], PROMPT[:96], PROMPT[:97], PROMPT * 2]
    single = [gpt.generate_ids(row, max_new_tokens=12) for row in rows]
    assert gpt.generate_ids(rows, max_new_tokens=12) == single


def test_past_the_context_each_token_is_chosen_as_from_a_prompt(gpt: GPT) -> None:
    ids = gpt.generate_ids(PROMPT, max_new_tokens=14)
    text = PROMPT + ids
    assert gpt.generate_ids(text[-161:-1], max_new_tokens=1) == ids[-1:]


def test_a_stop_ends_it(gpt: GPT) -> None:
    assert gpt.generate_ids(PROMPT, max_new_tokens=5, should_stop=lambda: True) == []


def test_a_bundle_without_it_is_read_by_decode(bundles: Path, tmp_path: Path) -> None:
    """As those are that were exported before there was one."""
    bundle = shutil.copytree(bundles / "long", tmp_path / "bundle")
    (bundle / "onnx" / "prefill.onnx").unlink()
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["graphs"]["prefill"]
    manifest["files"] = [entry for entry in manifest["files"] if entry["path"] != "onnx/prefill.onnx"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with load(bundle) as gpt:
        assert gpt._session.prefill_of(len(PROMPT)) is None
        assert len(gpt.generate_ids(PROMPT, max_new_tokens=3)) == 3


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("key", ["name", "dtype", "shape"])
@pytest.mark.parametrize("index", [0, 1, 3, 4])
def test_each_of_its_tensors_is_compared(bundles: Path, tmp_path: Path, side: str, key: str, index: int) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(bundles / "long", bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    tensor = manifest["graphs"]["prefill"][side][index]
    tensor[key] = {"name": "other", "dtype": "float64", "shape": ["other"]}[key]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"is .*, not "):
        Session(open_bundle(bundle), provider="cpu", threads=1).prefill_of(MIN_TOKENS + 1)
