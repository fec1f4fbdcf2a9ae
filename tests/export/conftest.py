from pathlib import Path

import pytest
import torch
from gptedge_export import Vocabulary, export_bundle, load_vocabulary
from gptedge_models import GPTConfig, GPTModel

TINY = GPTConfig(vocab_size=300, context_length=24, emb_dim=32, n_heads=4, n_layers=2)


@pytest.fixture(scope="session")
def byte_vocabulary() -> Vocabulary:
    return load_vocabulary("bytes")


@pytest.fixture(scope="session")
def tiny_model() -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(TINY).eval()


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model: GPTModel, byte_vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "tiny"
    export_bundle(tiny_model, path, vocabulary=byte_vocabulary)
    return path
