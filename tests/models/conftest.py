import pytest
import torch
from gptedge_models import GPTConfig, GPTModel, load_checkpoint

TINY = GPTConfig(vocab_size=65, context_length=16, emb_dim=24, n_heads=4, n_layers=2, drop_rate=0.5, qkv_bias=True)


@pytest.fixture(scope="session")
def tiny() -> GPTConfig:
    return TINY


@pytest.fixture
def model(tiny: GPTConfig) -> GPTModel:
    return load_checkpoint("random", config=tiny)


@pytest.fixture
def ids(tiny: GPTConfig) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(tiny.vocab_size, (2, tiny.context_length), generator=generator)
