"""export-hf, read back by transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gptedge_export import Vocabulary
from gptedge_export.hugging_face import export_hugging_face
from gptedge_models import GPTConfig, GPTModel, load_checkpoint
from transformers import AutoTokenizer, GPT2LMHeadModel

from ..commands import run
from .patterns import CL100K

SIZES: dict[str, Any] = {"vocab_size": 300, "context_length": 24, "emb_dim": 32, "n_heads": 4, "n_layers": 2}


def random_model(tied: bool, **settings: bool) -> GPTModel:
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(**SIZES, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # biases and norms that are not the identity
    if tied:
        model.out_head.weight = model.tok_emb.weight
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("settings", [{}, {"qkv_bias": True}, {"exact_gelu": True}], ids=str)
@torch.no_grad()
def test_logits_of_transformers_equal_ours(
    byte_vocabulary: Vocabulary, tmp_path: Path, tied: bool, settings: dict[str, bool]
) -> None:
    model = random_model(tied, **settings)
    export_hugging_face(model, tmp_path / "hf", vocabulary=byte_vocabulary)
    loaded: Any = GPT2LMHeadModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    theirs, loading = loaded
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert (theirs.lm_head.weight.data_ptr() == theirs.transformer.wte.weight.data_ptr()) is tied
    ids = torch.randint(300, (2, 24))
    logits = model(ids)
    atol = 2e-5 * float(logits.abs().max())  # float32 sums in another order: fused c_attn, fused norms
    torch.testing.assert_close(theirs.eval()(ids).logits, logits, atol=atol, rtol=0)


def test_the_folder_loads_back_bit_for_bit(byte_vocabulary: Vocabulary, tmp_path: Path) -> None:
    model = random_model(tied=False, qkv_bias=True)
    export_hugging_face(model, tmp_path / "hf", vocabulary=byte_vocabulary)
    loaded = load_checkpoint(tmp_path / "hf").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kept", ["tokenizer.json", "vocab.json"])
def test_its_tokenizer_is_gpt2s_in_both_forms(gpt2: Vocabulary, tmp_path: Path, kept: str) -> None:
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(vocab_size=50257, context_length=8, emb_dim=8, n_heads=1, n_layers=1)).eval()
    export_hugging_face(model, tmp_path / "hf", vocabulary=gpt2)
    for name in {"tokenizer.json", "vocab.json"} - {kept}:
        (tmp_path / "hf" / name).unlink()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("Hello, I am").input_ids == [15496, 11, 314, 716]
    assert tokenizer.eos_token_id == 50256


def test_its_tokenizer_splits_by_the_vocabularys_pattern(gpt2: Vocabulary, tmp_path: Path) -> None:
    model = GPTModel(GPTConfig(vocab_size=50257, context_length=8, emb_dim=8, n_heads=1, n_layers=1)).eval()
    vocabulary = Vocabulary(gpt2.ranks, gpt2.special_tokens, CL100K)
    export_hugging_face(model, tmp_path / "hf", vocabulary=vocabulary)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("I'M here\n\nin 2017").input_ids == vocabulary.encode("I'M here\n\nin 2017")
    assert tokenizer.eos_token_id == 50256


def test_the_command_writes_the_folder_once(tmp_path: Path) -> None:
    torch.save(random_model(tied=True).state_dict(), tmp_path / "model.pth")
    (tmp_path / "sizes.json").write_text('{"n_heads": 4}')
    options = ["--config", str(tmp_path / "sizes.json"), "--tokenizer", "bytes", "-o", str(tmp_path / "hf")]
    args = [str(tmp_path / "model.pth"), *options]
    result = run("export-hf", *args)
    assert (result.returncode, result.stderr) == (0, "")
    assert load_checkpoint(tmp_path / "hf").config.n_heads == 4
    again = run("export-hf", *args)
    assert (again.returncode, again.stdout) == (2, "")
    assert "exists: choose another -o" in again.stderr


def test_a_tokenizer_larger_than_the_model_is_refused(gpt2: Vocabulary, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 50,257 tokens, the model only 300"):
        export_hugging_face(random_model(tied=True), tmp_path / "hf", vocabulary=gpt2)
    assert not (tmp_path / "hf").exists()
