import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from gptedge_models import CheckpointError, GPTConfig, load_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

Refusal = Callable[..., CheckpointError]
SIZES = {"vocab_size": 65, "n_positions": 16, "n_embd": 24, "n_head": 4, "n_layer": 2}
REST = {"bos_token_id": 64, "eos_token_id": 64, "attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}


def gpt2(**options: Any) -> GPT2LMHeadModel:
    """Return a GPT-2 of transformers whose every tensor is random, biases and norms included."""
    model: GPT2LMHeadModel = GPT2LMHeadModel(GPT2Config(**{**SIZES, **REST, **options}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    gpt2().save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def edit_config(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


@torch.no_grad()
def assert_same_logits(source: Path, model: GPT2LMHeadModel, ids: Tensor) -> None:
    ours, theirs = load_checkpoint(source)(ids), model(ids).logits
    # float32 sums in another order: fused c_attn, fused norms
    torch.testing.assert_close(ours, theirs, atol=2e-5 * float(theirs.abs().max()), rtol=0)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "sizes", [{}, {"n_head": 1}, {"n_embd": 36, "n_head": 6, "n_layer": 3}, {"n_inner": 96}], ids=str
)
def test_logits_equal_those_of_transformers(tmp_path: Path, ids: Tensor, tied: bool, sizes: dict[str, Any]) -> None:
    model = gpt2(tie_word_embeddings=tied, **sizes)
    model.save_pretrained(tmp_path)
    assert_same_logits(tmp_path, model, ids)


def test_config_is_the_one_of_the_folder(folder: Path) -> None:
    expected = GPTConfig(vocab_size=65, context_length=16, emb_dim=24, n_heads=4, n_layers=2, qkv_bias=True)
    assert load_checkpoint(folder).config == expected


def test_tied_head_shares_the_memory_of_the_embedding(folder: Path) -> None:
    model = load_checkpoint(folder)
    assert model.out_head.weight.data_ptr() == model.tok_emb.weight.data_ptr()


def test_tied_head_may_be_stored_too(folder: Path, ids: Tensor) -> None:
    edit_weights(folder, lambda w: w.update({"lm_head.weight": w["transformer.wte.weight"].clone()}))
    assert_same_logits(folder, gpt2(), ids)


def test_names_without_prefix_and_old_mask_buffers_are_known(folder: Path, ids: Tensor) -> None:
    model = gpt2()
    base = GPT2Model(model.config)
    base.load_state_dict(model.transformer.state_dict())
    base.save_pretrained(folder)
    assert "wte.weight" in load_file(folder / "model.safetensors")
    masks = {"h.0.attn.bias": torch.ones(1, 1, 16, 16).tril(), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    assert_same_logits(edit_weights(folder, lambda w: w.update(masks)), model, ids)


@pytest.mark.parametrize(("activation", "exact"), [("gelu", True), ("gelu_new", False), ("gelu_pytorch_tanh", False)])
def test_both_kinds_of_gelu_are_known(tmp_path: Path, ids: Tensor, activation: str, exact: bool) -> None:
    model = gpt2(activation_function=activation)
    model.save_pretrained(tmp_path)
    assert load_checkpoint(tmp_path).config.exact_gelu is exact
    assert_same_logits(tmp_path, model, ids)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    gpt2().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> Path:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    edit(index["weight_map"])
    file.write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("source", [".", "model.safetensors.index.json"])
def test_shards_are_read_as_their_index_says(sharded: Path, ids: Tensor, source: str) -> None:
    stale = load_file(sharded / "model-00001-of-00004.safetensors")
    save_file({name: tensor + 1 for name, tensor in stale.items()}, sharded / "model-00001-of-00009.safetensors")
    assert_same_logits(sharded / source, gpt2(), ids)


def test_shards_are_read_without_an_index(sharded: Path, ids: Tensor) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    assert_same_logits(sharded, gpt2(), ids)


def test_missing_shard_is_named(refusal: Refusal, sharded: Path) -> None:
    (sharded / "model-00002-of-00004.safetensors").unlink()
    error = refusal(sharded)
    assert isinstance(error, FileNotFoundError)
    assert "model-00002-of-00004.safetensors does not exist" in str(error)


def test_shard_that_was_not_fetched_is_named(refusal: Refusal, sharded: Path) -> None:
    (sharded / "model-00002-of-00004.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "model-00002-of-00004.safetensors is a Git LFS pointer" in str(refusal(sharded))


def test_tensor_that_its_shard_lacks_is_named(refusal: Refusal, sharded: Path) -> None:
    edit_index(sharded, lambda places: places.update({"transformer.more": "model-00001-of-00004.safetensors"}))
    assert "places transformer.more in model-00001-of-00004.safetensors, which lacks it" in str(refusal(sharded))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_index_that_is_none_is_refused(refusal: Refusal, sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text or "\n")
    message = str(refusal(sharded))
    assert "model.safetensors.index.json is" in message


def test_index_that_leads_out_of_the_folder_is_refused(refusal: Refusal, sharded: Path) -> None:
    edit_index(sharded, lambda places: places.update({"transformer.wte.weight": "../model.safetensors"}))
    assert "is no index" in str(refusal(sharded))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(folder: Path, ids: Tensor, dtype: torch.dtype) -> None:
    model = gpt2()
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in model.state_dict().items()})
    edit_weights(folder, lambda w: w.update({name: tensor.to(dtype) for name, tensor in w.items()}))
    assert_same_logits(folder, model, ids)


def test_loaded_model_does_not_depend_on_the_file(folder: Path, ids: Tensor) -> None:
    model = load_checkpoint(folder)
    before = model(ids)
    file = folder / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(model(ids), before)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt_neo"}, "model_type 'gpt_neo' (only 'gpt2')"),
        ({"activation_function": "relu"}, "activation_function 'relu' (only 'gelu_new' or 'gelu')"),
        ({"activation_function": []}, "activation_function [] (only 'gelu_new' or 'gelu')"),
        ({"activation_function": {}}, "activation_function {} (only 'gelu_new' or 'gelu')"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-06 (only 1e-05)"),
        ({"scale_attn_weights": False}, "scale_attn_weights False (only True)"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True (only False)"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn True (only False)"),
        ({"add_cross_attention": True}, "add_cross_attention True (only False)"),
        ({"n_inner": 48}, "n_inner 48 (only 4 n_embd = 96)"),
        ({"n_head": 5}, "emb_dim 24 is not a multiple of n_heads 5"),
        ({"n_head": None}, "n_heads is None"),
        ({"n_layer": 3}, "config.json says n_layers 3, the tensors 2"),
        ({"n_embd": None}, "config.json says emb_dim None, the tensors 24"),
        ({"vocab_size": 50257}, "config.json says vocab_size 50257, the tensors 65"),
        ({"n_positions": 1024}, "config.json says context_length 1024, the tensors 16"),
        ({"tie_word_embeddings": False}, "config.json says tie_word_embeddings False, the tensors True"),
    ],
    ids=str,
)
def test_config_of_another_architecture_is_refused(
    refusal: Refusal, folder: Path, changes: dict[str, Any], named: str
) -> None:
    assert named in str(refusal(edit_config(folder, **changes)))


def test_all_unknown_settings_are_named(refusal: Refusal, folder: Path) -> None:
    message = str(refusal(edit_config(folder, activation_function="relu", n_inner=8, add_cross_attention=True)))
    assert all(name in message for name in ("activation_function", "n_inner", "add_cross_attention"))


def test_tied_head_unlike_the_embedding_is_refused(refusal: Refusal, folder: Path) -> None:
    edit_weights(folder, lambda w: w.update({"lm_head.weight": w["transformer.wte.weight"] + 1}))
    assert "has lm_head unlike wte: set tie_word_embeddings false" in str(refusal(folder))


def test_given_config_that_contradicts_the_folder_is_refused(refusal: Refusal, folder: Path) -> None:
    message = str(refusal(folder, config="gpt2-small"))
    assert "the given config says vocab_size 50257, config.json 65" in message


def test_config_json_can_be_given_for_random(folder: Path) -> None:
    assert load_checkpoint("random", config=folder / "config.json").config.emb_dim == 24


NAMES = ["transformer.wte.weight", "transformer.wpe.weight", "transformer.h.1.attn.c_attn.weight"]
NAMES += ["transformer.h.0.attn.c_attn.bias", "transformer.h.0.mlp.c_proj.weight", "transformer.ln_f.bias"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", ["missing", "unexpected", "wrong shape", "torch.int64", "not finite"])
def test_faulty_tensor_is_named_as_it_is_stored(refusal: Refusal, folder: Path, name: str, fault: str) -> None:
    def spoil(weights: dict[str, Tensor]) -> None:
        tensor = weights.pop(name)
        if fault == "unexpected":
            weights |= {name: tensor, f"{name}2": tensor.clone()}
        elif fault == "wrong shape":
            weights[name] = torch.cat([tensor, tensor], dim=-1)
        elif fault == "torch.int64":
            weights[name] = tensor.long()
        elif fault == "not finite":
            weights[name] = tensor.where(tensor != tensor.max(), torch.nan)

    message = str(refusal(edit_weights(folder, spoil), config={"emb_dim": 24}))
    assert fault in message
    assert name in message


def test_classifier_is_refused(refusal: Refusal, folder: Path) -> None:
    edit_weights(folder, lambda w: w.update({"score.weight": torch.zeros(2, 24)}))
    assert "unexpected score.weight" in str(refusal(folder))


def test_file_is_read_with_the_config_beside_it(folder: Path, ids: Tensor) -> None:
    assert_same_logits(folder / "model.safetensors", gpt2(), ids)


@pytest.mark.parametrize("source", [".", "model.safetensors"])
def test_weights_without_their_config_are_refused(refusal: Refusal, folder: Path, source: str) -> None:
    (folder / "config.json").unlink()
    error = refusal(folder / source, config={"n_heads": 4})
    assert isinstance(error, FileNotFoundError)
    assert "without config.json" in str(error)


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("source", "repository"),
    [
        ("gpt2", "openai-community--gpt2"),
        ("gpt2-xl", "openai-community--gpt2-xl"),
        ("some-one/my.gpt_2", "some-one--my.gpt_2"),
    ],
)
def test_hub_id_is_read_from_the_cache_of_the_hub(
    offline_hub: Path, folder: Path, ids: Tensor, source: str, repository: str
) -> None:
    cache = offline_hub / f"models--{repository}"
    shutil.copytree(folder, cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    assert torch.equal(load_checkpoint(source)(ids), load_checkpoint(folder)(ids))


@pytest.mark.parametrize("source", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "some-one/gpt"])
def test_unreachable_hub_is_told_in_one_line(refusal: Refusal, offline_hub: Path, source: str) -> None:
    error = refusal(source)
    assert isinstance(error, FileNotFoundError)
    assert f"{source} could not be fetched from the Hugging Face hub (the hub cannot be reached)" in str(error)


def test_folder_comes_before_a_hub_id(offline_hub: Path, folder: Path) -> None:
    shutil.copytree(folder, "some-one/gpt")
    assert load_checkpoint("some-one/gpt").config.emb_dim == 24


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_not_held_twice(tmp_path: Path, peak_kib: Callable[[Path], int]) -> None:
    model = gpt2(vocab_size=30_000, n_embd=384, n_layer=12)
    model.save_pretrained(tmp_path)
    weights_kib = (tmp_path / "model.safetensors").stat().st_size // 1024
    added_kib = peak_kib(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert added_kib < 1.5 * weights_kib  # one copy, and the largest tensor, a third of it, while it is read
