"""The faster variants of the book's model: its names, but one layer for query, key and value, and PyTorch's norm."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from gptedge_models import CheckpointError, GPTConfig, load_checkpoint
from torch import Tensor, nn

Refusal = Callable[..., CheckpointError]


class FusedAttention(nn.Module):
    def __init__(self, config: GPTConfig, masked: bool) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(config.emb_dim, 3 * config.emb_dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.emb_dim, config.emb_dim)
        if masked:
            self.register_buffer("mask", torch.triu(torch.ones((config.context_length,) * 2), diagonal=1))

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, n_heads, T, head_dim)
        context = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.proj(context.transpose(1, 2).reshape(b, t, width))
        return out


class FastBlock(nn.Module):
    def __init__(self, config: GPTConfig, masked: bool) -> None:
        super().__init__()
        self.att = FusedAttention(config, masked)
        self.ff = nn.Module()
        self.ff.layers = nn.Sequential(
            nn.Linear(config.emb_dim, 4 * config.emb_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * config.emb_dim, config.emb_dim),
        )
        self.norm1, self.norm2 = nn.LayerNorm(config.emb_dim), nn.LayerNorm(config.emb_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.att(self.norm1(x))
        out: Tensor = x + cast(nn.Sequential, self.ff.layers)(self.norm2(x))
        return out


class FastModel(nn.Module):
    def __init__(self, config: GPTConfig, masked: bool = False) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.trf_blocks = nn.Sequential(*(FastBlock(config, masked) for _ in range(config.n_layers)))
        self.final_norm = nn.LayerNorm(config.emb_dim)
        self.out_head = nn.Linear(config.emb_dim, config.vocab_size, bias=False)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.3, generator=generator)  # biases and norms too

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok_emb(ids) + self.pos_emb(torch.arange(ids.shape[1]))
        out: Tensor = self.out_head(self.final_norm(self.trf_blocks(x)))
        return out


@torch.no_grad()
def assert_same_logits(path: Path, model: nn.Module, ids: Tensor) -> None:
    ours, theirs = load_checkpoint(path, config={"n_heads": 4})(ids), model(ids)
    # float32 sums in another order: fused layers, norms and attention
    torch.testing.assert_close(ours, theirs, atol=2e-5 * float(theirs.abs().max()), rtol=0)


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("qkv_bias", [False, True], ids=["no bias", "bias"])
def test_logits_equal_those_of_the_variant(
    tiny: GPTConfig, tmp_path: Path, ids: Tensor, masked: bool, qkv_bias: bool
) -> None:
    config = GPTConfig(**{**tiny.to_dict(), "qkv_bias": qkv_bias})
    model = FastModel(config, masked)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    assert_same_logits(tmp_path / "model.pth", model, ids)
    assert load_checkpoint(tmp_path / "model.pth", config={"n_heads": 4}).config.qkv_bias is qkv_bias


def compiled(model: nn.Module) -> nn.Module:
    return cast(nn.Module, torch.compile(model))


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (compiled, "_orig_mod."),
        (nn.DataParallel, "module."),
        (lambda model: compiled(nn.DataParallel(model)), "_orig_mod.module."),
        (lambda model: nn.DataParallel(compiled(model)), "module._orig_mod."),
    ],
    ids=["compiled", "parallel", "compiled parallel", "parallel compiled"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_training_on_many_devices_leaves_prefixes(
    tiny: GPTConfig, tmp_path: Path, ids: Tensor, wrap: Callable[[nn.Module], nn.Module], prefix: str, dtype: Any
) -> None:
    model = FastModel(tiny).to(dtype)
    state = wrap(model).state_dict()
    assert all(name.startswith(prefix) for name in state)
    torch.save({"model_state_dict": state, "optimizer_state_dict": {}, "epoch": 3}, tmp_path / "checkpoint.pth")
    assert_same_logits(tmp_path / "checkpoint.pth", model.float(), ids)


@pytest.mark.parametrize("name", ["trf_blocks.1.att.qkv.weight", "trf_blocks.0.norm2.bias", "final_norm.weight"])
@pytest.mark.parametrize("fault", ["wrong shape", "not finite"])
def test_faulty_tensor_is_named_as_it_is_stored(
    refusal: Refusal, tiny: GPTConfig, tmp_path: Path, name: str, fault: str
) -> None:
    state = FastModel(tiny).state_dict()
    state[name] = torch.cat([state[name]] * 2) if fault == "wrong shape" else state[name] / 0
    torch.save(state, tmp_path / "model.pth")
    message = str(refusal(tmp_path / "model.pth", config=tiny))
    assert fault in message
    assert name in message


def test_both_names_of_one_tensor_are_refused(refusal: Refusal, tiny: GPTConfig, tmp_path: Path) -> None:
    state = FastModel(tiny).state_dict()
    state["final_norm.scale"] = state["final_norm.weight"]
    torch.save(state, tmp_path / "model.pth")
    assert "unexpected final_norm.scale" in str(refusal(tmp_path / "model.pth", config=tiny))
