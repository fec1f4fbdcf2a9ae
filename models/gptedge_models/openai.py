"""GPT-2 as OpenAI published it: TensorFlow's variables, and ``hparams.json``."""

from collections.abc import Mapping
from typing import Any

from .hf import blocks_and_ends
from .layout import Plan, Shape, count_blocks

_SETTINGS = {
    "n_vocab": "vocab_size",
    "n_ctx": "context_length",
    "n_embd": "emb_dim",
    "n_head": "n_heads",
    "n_layer": "n_layers",
}


def openai(stored: Mapping[str, Shape]) -> Plan | None:
    """Recognise the variables of OpenAI's model; what an optimizer keeps beside them is ignored."""
    if "model/wte" not in stored and not any(name.startswith("model/h0/") for name in stored):
        return None
    n_layers = count_blocks(r"model/h(\d+)/", stored)
    parts = {_variable(name): part for name, part in blocks_and_ends("", n_layers).items()}
    ignored = {name for name in stored if not name.startswith("model/") or name.rpartition("/")[0] in parts}
    facts = {"n_layers": n_layers, "qkv_bias": True}
    return Plan(facts, parts, ignored=frozenset(ignored - parts.keys()), config_file="hparams.json")


def _variable(name: str) -> str:
    """Return OpenAI's name for Hugging Face's: ``h.0.attn.c_attn.weight`` is ``model/h0/attn/c_attn/w``."""
    *path, kind = name.split(".")
    scope = "model/" + "/".join(path).replace("h/", "h", 1)
    if path[-1] in ("wte", "wpe"):
        return scope
    letter = "b" if kind == "bias" else "g" if path[-1].startswith("ln_") else "w"
    return f"{scope}/{letter}"


def translate_hparams(values: Mapping[str, Any]) -> dict[str, Any]:
    """Translate ``hparams.json`` into the book's settings; keys that OpenAI does not have stay, and will be refused."""
    return {_SETTINGS.get(key, key): value for key, value in values.items()}
