"""The book's own checkpoints, and those of its faster variants."""

import re
from collections.abc import Mapping

from .gpt import GPTConfig
from .layout import Part, Plan, Shape, count_blocks, empty_model, shapes

# What the faster variants call the tensors of a block: query, key and value in one layer, and PyTorch's own LayerNorm.
_VARIANTS = {
    "att.qkv.weight": Part(("att.W_query.weight", "att.W_key.weight", "att.W_value.weight")),
    "att.qkv.bias": Part(("att.W_query.bias", "att.W_key.bias", "att.W_value.bias")),
    "att.proj.weight": Part(("att.out_proj.weight",)),
    "att.proj.bias": Part(("att.out_proj.bias",)),
    "norm1.weight": Part(("norm1.scale",)),
    "norm1.bias": Part(("norm1.shift",)),
    "norm2.weight": Part(("norm2.scale",)),
    "norm2.bias": Part(("norm2.shift",)),
}
_FINAL = {"final_norm.weight": Part(("final_norm.scale",)), "final_norm.bias": Part(("final_norm.shift",))}


def book(stored: Mapping[str, Shape]) -> Plan | None:
    """Recognise the state dict of the book's ``GPTModel``, also with chapter 6's head; the masks may be missing."""
    if "tok_emb.weight" not in stored and not any(name.startswith("trf_blocks.") for name in stored):
        return None
    n_layers = count_blocks(r"trf_blocks\.(\d+)\.", stored)
    queries = re.compile(r"trf_blocks\.\d+\.att\.(?:W_query|qkv)\.(weight|bias)")
    kinds = {match[1] for name in stored if (match := queries.fullmatch(name))}
    qkv_bias = "bias" in kinds
    tiny = GPTConfig(vocab_size=1, context_length=1, emb_dim=1, n_heads=1, n_layers=n_layers, qkv_bias=qkv_bias)
    parts = {name: Part((name,)) for name in shapes(empty_model(tiny)) if name in stored or not name.endswith(".mask")}
    for name, part in _variants(n_layers).items():
        if name in stored:
            for replaced in part.names:
                parts.pop(replaced, None)
            parts[name] = part
    n_classes = None
    if "out_head.bias" in stored:
        parts["out_head.bias"] = Part(("out_head.bias",))
        n_classes = max((1, *stored["out_head.bias"]))
    facts = {"n_layers": n_layers} | ({"qkv_bias": qkv_bias} if kinds else {})  # tensors of other names say nothing
    return Plan(facts, parts, n_classes=n_classes)


def _variants(n_layers: int) -> dict[str, Part]:
    blocks = [f"trf_blocks.{i}." for i in range(n_layers)]
    return {block + name: part.under(block) for block in blocks for name, part in _VARIANTS.items()} | _FINAL
