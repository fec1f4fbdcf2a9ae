"""prefill.onnx: long prompts of an int8 or int4 bundle, each read alone and in parts."""

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
from gptedge_runtime.prefill import MIN_TOKENS
from gptedge_runtime.session import Session
from numpy.typing import NDArray


@pytest.fixture(scope="module", params=MIN_TOKENS)
def gpt(request: pytest.FixtureRequest, bundles: Path) -> Iterator[GPT]:
    with load(bundles / f"long-{request.param}") as gpt:
        yield gpt


@pytest.fixture
def least(gpt: GPT) -> int:
    """Of the tokens of a prompt that is read with it."""
    return MIN_TOKENS[gpt._session.precision] + 1


@pytest.fixture
def prompt(gpt: GPT) -> list[int]:
    """Ten tokens less than the context."""
    ids: list[int] = np.random.default_rng(3).integers(270, size=gpt._session.model.context_length - 10).tolist()
    return ids


def key_values(gpt: GPT, row: list[int]) -> list[NDArray[np.int8]]:
    cache = gpt._session.new_cache(1, len(row))
    cache.prefill([row], never)
    return cache.key_values


def test_long_prompts_are_read_with_it(gpt: GPT, prompt: list[int], least: int) -> None:
    graph = gpt._session.prefill_of(least)
    assert graph is not None
    buffers = gpt._session.new_key_values(1, len(prompt))
    graph.read(prompt[:-1], buffers, never)
    for found, wanted in zip(key_values(gpt, prompt), buffers, strict=True):
        np.testing.assert_array_equal(found[:, :, :-1], wanted[:, :, :-1])


def test_short_ones_are_not(gpt: GPT, least: int) -> None:
    assert gpt._session.prefill_of(least - 1) is None


def test_in_parts_it_reads_the_same(gpt: GPT, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """To two steps of 8 bits: attention in float32 may add in another order."""
    whole = key_values(gpt, prompt)
    monkeypatch.setattr(module, "PART_TOKENS", 30)
    for found, wanted in zip(key_values(gpt, prompt), whole, strict=True):
        assert np.abs(found.astype(int) - wanted).max() <= 2


def test_fewer_bits_read_nearly_the_same(gpt: GPT, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that cuts sums off. Each rounds in its own way; a key or value has 127 steps."""
    whole = key_values(gpt, prompt)
    monkeypatch.setattr(module, "ACTIVATION_MAX", 63)
    for found, wanted in zip(key_values(gpt, prompt), whole, strict=True):
        assert np.abs(found.astype(int) - wanted)[:, :, :-1].max() <= 12


def test_a_batch_has_the_ids_of_single_rows(gpt: GPT, prompt: list[int], least: int) -> None:
    rows = [prompt, prompt[:3], prompt[5:-5], prompt[: least - 1], prompt[:least], prompt * 2]
    single = [gpt.generate_ids(row, max_new_tokens=12) for row in rows]
    assert gpt.generate_ids(rows, max_new_tokens=12) == single


def test_past_the_context_each_token_is_chosen_as_from_a_prompt(gpt: GPT, prompt: list[int]) -> None:
    ids = gpt.generate_ids(prompt, max_new_tokens=14)
    text = prompt + ids
    assert gpt.generate_ids(text[-len(prompt) - 11 : -1], max_new_tokens=1) == ids[-1:]


def test_a_stop_ends_it(gpt: GPT, prompt: list[int]) -> None:
    assert gpt.generate_ids(prompt, max_new_tokens=5, should_stop=lambda: True) == []


def test_a_bundle_without_it_is_read_by_decode(bundles: Path, tmp_path: Path) -> None:
    """As those are that were exported before there was one."""
    bundle = shutil.copytree(bundles / "long-int8", tmp_path / "bundle")
    (bundle / "onnx" / "prefill.onnx").unlink()
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["graphs"]["prefill"]
    manifest["files"] = [entry for entry in manifest["files"] if entry["path"] != "onnx/prefill.onnx"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with load(bundle) as gpt:
        assert gpt._session.prefill_of(150) is None
        assert len(gpt.generate_ids([1, 2, 3] * 50, max_new_tokens=3)) == 3


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("key", ["name", "dtype", "shape"])
@pytest.mark.parametrize("index", [0, 1, 3, 4])
def test_each_of_its_tensors_is_compared(bundles: Path, tmp_path: Path, side: str, key: str, index: int) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(bundles / "long-int8", bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    tensor = manifest["graphs"]["prefill"][side][index]
    tensor[key] = {"name": "other", "dtype": "float64", "shape": ["other"]}[key]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"is .*, not "):
        Session(open_bundle(bundle), provider="cpu", threads=1).prefill_of(150)
