"""nanoGPT's ``ckpt.pt``, held against a model with the modules and names of its class ``GPT``."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from gptedge_models import CheckpointError, GPTConfig, load_checkpoint
from torch import Tensor, nn

Refusal = Callable[..., CheckpointError]
ARGS = {"n_layer": 2, "n_head": 4, "n_embd": 24, "block_size": 16, "bias": True, "vocab_size": 65, "dropout": 0.2}


class Norm(nn.Module):
    """LayerNorm whose bias is optional."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    def __init__(self, args: dict[str, Any]) -> None:
        super().__init__()
        width, bias, size = args["n_embd"], args["bias"], args["block_size"]
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)
        self.n_head = args["n_head"]
        if args.get("slow"):  # before PyTorch 2 had its fused attention, the mask was a buffer named bias
            self.register_buffer("bias", torch.tril(torch.ones(size, size)).view(1, 1, size, size))

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        q, k, v = (y.view(b, t, self.n_head, -1).transpose(1, 2) for y in self.c_attn(x).split(width, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, width)
        out: Tensor = self.c_proj(y)
        return out


class Mlp(nn.Module):
    def __init__(self, args: dict[str, Any]) -> None:
        super().__init__()
        self.c_fc = nn.Linear(args["n_embd"], 4 * args["n_embd"], bias=args["bias"])
        self.gelu = nn.GELU(approximate=args.get("gelu", "none"))
        self.c_proj = nn.Linear(4 * args["n_embd"], args["n_embd"], bias=args["bias"])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(self.gelu(self.c_fc(x)))
        return out


class Block(nn.Module):
    def __init__(self, args: dict[str, Any]) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = (Norm(args["n_embd"], args["bias"]) for _ in range(2))
        self.attn, self.mlp = Attention(args), Mlp(args)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class NanoGpt(nn.Module):
    def __init__(self, args: dict[str, Any]) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(args["vocab_size"], args["n_embd"]),
                "wpe": nn.Embedding(args["block_size"], args["n_embd"]),
                "h": nn.ModuleList(Block(args) for _ in range(args["n_layer"])),
                "ln_f": Norm(args["n_embd"], args["bias"]),
            }
        )
        self.lm_head = nn.Linear(args["n_embd"], args["vocab_size"], bias=False)
        cast(nn.Embedding, self.transformer["wte"]).weight = self.lm_head.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transformer["wte"](ids) + self.transformer["wpe"](torch.arange(ids.shape[1]))
        for block in cast(nn.ModuleList, self.transformer["h"]):
            x = block(x)
        out: Tensor = self.lm_head(self.transformer["ln_f"](x))
        return out


def build(**changes: Any) -> NanoGpt:
    """Return a model whose every tensor is random, biases and norms included."""
    model = NanoGpt({**ARGS, **changes})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model


def save(model: nn.Module, path: Path, **model_args: Any) -> Path:
    """Write what nanoGPT's train.py writes."""
    optimizer = torch.optim.AdamW(model.parameters())
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": {**ARGS, **model_args},
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "device": "cuda", "learning_rate": 1e-3, "compile": True},
    }
    torch.save(content, path)
    return path


@torch.no_grad()
def assert_same_logits(path: Path, model: NanoGpt, ids: Tensor, config: Any = None) -> None:
    ours, theirs = load_checkpoint(path, config=config)(ids), model(ids)
    # float32 sums in another order: fused layers, norms and attention
    torch.testing.assert_close(ours, theirs, atol=2e-5 * float(theirs.abs().max()), rtol=0)


@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("changes", [{}, {"n_head": 1}, {"n_embd": 36, "n_head": 6, "n_layer": 3}], ids=str)
def test_logits_equal_those_of_nanogpt(tmp_path: Path, ids: Tensor, bias: bool, changes: dict[str, Any]) -> None:
    model = build(bias=bias, **changes)
    assert_same_logits(save(model, tmp_path / "ckpt.pt", bias=bias, **changes), model, ids)


@torch.no_grad()
def test_exact_gelu_is_told_apart_from_its_approximation(ids: Tensor) -> None:
    exact, approximate = build()(ids), build(gelu="tanh")(ids)
    assert float((exact - approximate).abs().max()) > 5e-5 * float(exact.abs().max())  # beyond assert_same_logits


def test_checkpoint_from_before_exact_gelu_needs_a_word(tmp_path: Path, ids: Tensor) -> None:
    model = build(gelu="tanh")
    assert_same_logits(save(model, tmp_path / "ckpt.pt"), model, ids, config={"exact_gelu": False})


def test_a_config_of_sizes_alone_says_nothing_of_gelu(tmp_path: Path, ids: Tensor) -> None:
    model = build()
    path = save(model, tmp_path / "ckpt.pt")
    assert_same_logits(path, model, ids, replace(load_checkpoint(path).config, exact_gelu=False))


@pytest.mark.parametrize(("settings", "gelu"), [({}, "none"), ({"exact_gelu": False}, "tanh")], ids=str)
def test_names_of_nanogpts_sizes_say_nothing_of_gelu(
    tmp_path: Path, ids: Tensor, settings: dict[str, bool], gelu: str
) -> None:
    model = build(gelu=gelu)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    (tmp_path / "sizes.json").write_text(json.dumps({"n_head": 4, "n_embd": 24, **settings}))
    assert_same_logits(tmp_path / "model.pt", model, ids, tmp_path / "sizes.json")


def test_config_is_the_one_of_model_args(tmp_path: Path) -> None:
    config = load_checkpoint(save(build(), tmp_path / "ckpt.pt")).config
    sizes = {"vocab_size": 65, "context_length": 16, "emb_dim": 24, "n_heads": 4, "n_layers": 2}
    assert config == GPTConfig(**sizes, drop_rate=0.2, qkv_bias=True, exact_gelu=True)


def test_head_shares_the_memory_of_the_embedding(tmp_path: Path) -> None:
    model = load_checkpoint(save(build(), tmp_path / "ckpt.pt"))
    assert model.out_head.weight.data_ptr() == model.tok_emb.weight.data_ptr()


def test_compiled_model_and_old_mask_buffers_are_known(tmp_path: Path, ids: Tensor) -> None:
    model = build(slow=True)
    compiled = cast(nn.Module, torch.compile(model))
    assert "_orig_mod.transformer.h.0.attn.bias" in compiled.state_dict()
    assert_same_logits(save(compiled, tmp_path / "ckpt.pt"), model, ids)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(tmp_path: Path, ids: Tensor, dtype: torch.dtype) -> None:
    path = save(build().to(dtype), tmp_path / "ckpt.pt")
    assert_same_logits(path, build().to(dtype).float(), ids)


def test_bare_state_dict_asks_for_its_heads(refusal: Refusal, tmp_path: Path, ids: Tensor) -> None:
    torch.save(build().state_dict(), tmp_path / "model.pt")
    message = str(refusal(tmp_path / "model.pt"))
    assert "does not say n_heads" in message
    assert "--config" in message
    assert_same_logits(tmp_path / "model.pt", build(), ids, config={"n_heads": 4})


def test_model_args_can_be_given_as_a_json_file(tmp_path: Path, ids: Tensor) -> None:
    torch.save(build().state_dict(), tmp_path / "model.pt")
    (tmp_path / "args.json").write_text(json.dumps(ARGS))
    loaded = load_checkpoint(tmp_path / "model.pt", config=tmp_path / "args.json")
    assert loaded.config.n_heads == 4


@pytest.mark.parametrize(
    ("model_args", "named"),
    [
        ({"n_head": 5}, "emb_dim 24 is not a multiple of n_heads 5"),
        ({"block_size": 32}, "model_args says context_length 32, the tensors 16"),
        ({"bias": False}, "model_args says qkv_bias False, the tensors True"),
        ({"use_rmsnorm": True}, "unknown keys use_rmsnorm"),
    ],
    ids=str,
)
def test_model_args_of_another_model_are_refused(
    refusal: Refusal, tmp_path: Path, model_args: dict[str, Any], named: str
) -> None:
    assert named in str(refusal(save(build(), tmp_path / "ckpt.pt", **model_args)))


def test_model_args_that_are_no_dict_are_refused(refusal: Refusal, tmp_path: Path) -> None:
    torch.save({"model": build().state_dict(), "model_args": [1]}, tmp_path / "ckpt.pt")
    assert "holds a list" in str(refusal(tmp_path / "ckpt.pt"))


@pytest.mark.parametrize("name", ["transformer.ln_f.weight", "transformer.h.1.attn.c_attn.weight", "lm_head.weight"])
@pytest.mark.parametrize("fault", ["wrong shape", "not finite", "unexpected"])
def test_faulty_tensor_is_named_as_it_is_stored(refusal: Refusal, tmp_path: Path, name: str, fault: str) -> None:
    state = {key: tensor.clone() for key, tensor in build().state_dict().items()}
    if fault == "wrong shape":
        state[name] = torch.cat([state[name], state[name]])
    elif fault == "not finite":
        state[name][-1] = torch.inf
    else:
        state[f"{name}2"] = state[name]
    torch.save({"model": state, "model_args": {**ARGS}}, tmp_path / "ckpt.pt")
    message = str(refusal(tmp_path / "ckpt.pt"))
    assert fault in message
    assert name in message


def test_missing_biases_beside_others_are_named(refusal: Refusal, tmp_path: Path) -> None:
    state = build().state_dict()
    del state["transformer.h.1.ln_1.bias"]
    torch.save({"model": state, "model_args": ARGS}, tmp_path / "ckpt.pt")
    assert "missing transformer.h.1.ln_1.bias" in str(refusal(tmp_path / "ckpt.pt"))
