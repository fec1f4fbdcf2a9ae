"""OpenAI's checkpoints, read from files that TensorFlow itself wrote (tests/golden/write_openai.py)."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gptedge_models import CheckpointError, GPTConfig, load_checkpoint
from gptedge_models.tensor_bundle import open_tensor_bundle
from hypothesis import given
from hypothesis import strategies as st

Refusal = Callable[..., CheckpointError]
GOLDEN = Path(__file__).parents[1] / "golden"
INDEX = (GOLDEN / "openai" / "model.ckpt.index").read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(GOLDEN / "openai", tmp_path / "117M")


@torch.no_grad()
def assert_same_logits(source: Path, name: str, config: dict[str, int] | None = None) -> None:
    answers = np.load(GOLDEN / name / "logits.npz")
    ours = load_checkpoint(source, config=config)(torch.from_numpy(answers["ids"])).numpy()
    # float32 sums in another order in TensorFlow
    np.testing.assert_allclose(ours, answers["logits"], atol=2e-5 * np.abs(answers["logits"]).max(), rtol=0)


@pytest.mark.parametrize("name", ["openai", "openai_trained"])
@pytest.mark.parametrize("source", [".", "model.ckpt.index"])
def test_logits_equal_those_of_tensorflow(name: str, source: str) -> None:
    assert_same_logits(GOLDEN / name / source, name)


def test_training_changed_the_logits() -> None:
    before, after = (np.load(GOLDEN / name / "logits.npz")["logits"] for name in ("openai", "openai_trained"))
    assert np.abs(before - after).max() > 0.01  # else the test above could read the wrong variables unseen


def test_config_is_the_one_of_hparams(folder: Path) -> None:
    expected = GPTConfig(vocab_size=257, context_length=8, emb_dim=8, n_heads=2, n_layers=2, qkv_bias=True)
    assert load_checkpoint(folder).config == expected


def test_head_shares_the_memory_of_the_embedding(folder: Path) -> None:
    model = load_checkpoint(folder)
    assert model.out_head.weight.data_ptr() == model.tok_emb.weight.data_ptr()


def test_checkpoint_that_was_moved_is_found(folder: Path) -> None:
    (folder / "checkpoint").write_text('model_checkpoint_path: "/home/someone/models/117M/model.ckpt"\n')
    assert_same_logits(folder, "openai")


def test_without_hparams_the_heads_are_asked_for(refusal: Refusal, folder: Path) -> None:
    (folder / "hparams.json").unlink()
    message = str(refusal(folder))
    assert "n_heads" in message
    assert "--config" in message
    assert_same_logits(folder, "openai", config={"n_heads": 2})


def test_hparams_of_another_model_are_refused(refusal: Refusal, folder: Path) -> None:
    hparams = json.loads((folder / "hparams.json").read_text())
    (folder / "hparams.json").write_text(json.dumps({**hparams, "n_ctx": 1024}))
    assert "hparams.json says context_length 1024, the tensors 8" in str(refusal(folder))


def test_every_number_type_is_read() -> None:
    stored, expected = open_tensor_bundle(GOLDEN / "dtypes" / "model.ckpt.index"), np.load(GOLDEN / "dtypes/logits.npz")
    assert sorted(expected) == ["bfloat16", "float16", "float32", "float64", "int32", "int64"]
    for name, values in expected.items():
        tensor = stored[name].read()
        assert str(tensor.dtype) == f"torch.{name}"
        assert tensor.double().tolist() == values.tolist()


@pytest.mark.parametrize(("name", "cause"), [("string", "of TensorFlow's type 7"), ("sliced", "stored in slices")])
def test_what_is_no_plain_tensor_is_refused(name: str, cause: str) -> None:
    with pytest.raises(CheckpointError, match=cause):
        open_tensor_bundle(GOLDEN / "dtypes" / "model.ckpt.index")[name].read()


def test_variables_of_another_model_are_named(refusal: Refusal) -> None:
    message = str(refusal(GOLDEN / "dtypes"))
    assert "holds another model (" in message
    assert "bfloat16" in message


@pytest.mark.parametrize("place", ["model.ckpt.data-00000-of-00001", "model.ckpt.index"])
def test_missing_file_is_named(refusal: Refusal, folder: Path, place: str) -> None:
    (folder / place).unlink()
    error = refusal(folder)
    assert isinstance(error, FileNotFoundError)
    assert f"{place} does not exist" in str(error)


def test_data_that_is_cut_short_is_refused(refusal: Refusal, folder: Path) -> None:
    data = folder / "model.ckpt.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:-1])
    assert "the data of model/wte is cut short" in str(refusal(folder))


def test_data_that_was_not_fetched_is_refused(refusal: Refusal, folder: Path) -> None:
    (folder / "model.ckpt.data-00000-of-00001").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "is a Git LFS pointer" in str(refusal(folder))


@pytest.mark.parametrize("text", ["", "model_checkpoint_path: model.ckpt", "\0" * 99])
def test_state_that_names_no_checkpoint_is_refused(refusal: Refusal, folder: Path, text: str) -> None:
    (folder / "checkpoint").write_text(text)
    assert "checkpoint names no checkpoint" in str(refusal(folder))


@given(place=st.integers(0, len(INDEX) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_index_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    shutil.copy(GOLDEN / "openai" / "model.ckpt.data-00000-of-00001", folder)
    (folder / "model.ckpt.index").write_bytes(INDEX[:place] + bytes([INDEX[place] ^ 1 << bit]) + INDEX[place + 1 :])
    with contextlib.suppress(CheckpointError):
        stored = open_tensor_bundle(folder / "model.ckpt.index")
        expected = open_tensor_bundle(GOLDEN / "openai" / "model.ckpt.index")
        assert stored.keys() == expected.keys()
        assert all(torch.equal(stored[name].read(), expected[name].read()) for name in expected)


@given(content=st.binary(max_size=200), ending=st.booleans())
def test_any_bytes_are_refused_as_an_index(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, ending: bool
) -> None:
    file = tmp_path_factory.mktemp("any") / "model.ckpt.index"
    file.write_bytes(content + (INDEX[-8:] if ending else b""))
    with pytest.raises(CheckpointError, match="is damaged or no TensorFlow checkpoint"):
        open_tensor_bundle(file)
