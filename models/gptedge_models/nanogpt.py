"""nanoGPT's ``ckpt.pt``: Hugging Face's names around PyTorch's own layers, biases on or off, exact GELU."""

from collections.abc import Mapping
from typing import Any

from .hf import blocks_and_ends
from .layout import Part, Plan, Shape, count_blocks

_SETTINGS = {
    "vocab_size": "vocab_size",
    "block_size": "context_length",
    "n_embd": "emb_dim",
    "n_head": "n_heads",
    "n_layer": "n_layers",
    "dropout": "drop_rate",
    "bias": "qkv_bias",
}


def nanogpt(stored: Mapping[str, Shape]) -> Plan | None:
    """Recognise the state dict of nanoGPT's ``GPT``: its fused layer is (3 D, D) where Hugging Face's is (D, 3 D).

    Checkpoints from before June 2023 have GPT-2's approximate GELU; only ``"exact_gelu": false`` in a config tells.
    """
    fused = [shape for name, shape in stored.items() if name.endswith(".attn.c_attn.weight")]
    if not any(len(shape) == 2 and shape[0] == 3 * shape[1] for shape in fused):
        return None
    n_layers = count_blocks(r"transformer\.h\.(\d+)\.", stored)
    bias = any(name.endswith(".attn.c_attn.bias") for name in stored)
    parts = {name: Part(part.names) for name, part in blocks_and_ends("transformer.", n_layers).items()}
    zeros: list[str] = []
    if not bias:
        for name in [name for name in parts if name.endswith(".bias")]:
            zeros += [target for target in parts.pop(name).names if ".att.W_" not in target]
    if "lm_head.weight" in stored:
        parts["lm_head.weight"] = Part(("out_head.weight",))
    return Plan(
        {"n_layers": n_layers, "qkv_bias": bias},
        parts,
        defaults={"exact_gelu": True},
        zeros=tuple(zeros),
        ignored=frozenset(f"transformer.h.{i}.attn.bias" for i in range(n_layers)),  # the causal mask
    )


def translate_model_args(values: Mapping[str, Any]) -> dict[str, Any]:
    """Translate ``model_args`` into the book's settings; keys that nanoGPT does not have stay, and will be refused."""
    return {_SETTINGS.get(key, key): value for key, value in values.items()}
