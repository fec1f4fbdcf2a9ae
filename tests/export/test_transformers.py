"""An independent implementation of the same architecture: transformers' GPT-2."""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ..commands import run


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT2LMHeadModel, Path]:
    """The model, and the bundle exported from the folder that transformers saved it to."""
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=300, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    model = GPT2LMHeadModel(config)
    torch.nn.Module.eval(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # biases and norms that are not the identity
    folder = tmp_path_factory.mktemp("hugging-face")
    model.save_pretrained(folder / "model")
    result = run("export-onnx", folder / "model", "--tokenizer", "bytes", "-o", folder / "bundle")
    assert result.returncode == 0, result.stderr
    return model, folder / "bundle"


def test_a_hugging_face_folder_exports_to_transformers_logits(hugging_face: tuple[GPT2LMHeadModel, Path]) -> None:
    model, bundle = hugging_face
    session = ort.InferenceSession(str(bundle / "onnx/forward.onnx"), providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(300, size=(2, 32))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    atol = max(1e-5, 2e-5 * float(np.abs(expected).max()))  # the bound of the export: float32 sums in another order
    np.testing.assert_allclose(session.run(None, {"input_ids": ids})[0], expected, rtol=0, atol=atol)


def test_its_tied_head_is_stored_once(hugging_face: tuple[GPT2LMHeadModel, Path]) -> None:
    model, bundle = hugging_face
    size = (bundle / "onnx/model.onnx_data").stat().st_size
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())  # counts the shared tensor once
    assert size <= weights + 64 * len(list(model.parameters()))


def test_its_config_reads_back_in_transformers(hugging_face: tuple[GPT2LMHeadModel, Path]) -> None:
    _, bundle = hugging_face
    config = GPT2Config(**json.loads((bundle / "config.json").read_text()))
    assert (config.n_layer, config.n_head, config.n_embd, config.n_positions) == (2, 4, 32, 32)
