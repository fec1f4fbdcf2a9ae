"""Which stored tensor becomes which of the model's: the plan of a checkpoint's layout, and the book's own."""

import re
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .gpt import GPTConfig, GPTModel

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """The tensors of the model that one stored tensor holds, side by side on its last axis.

    ``transposed``: stored as (in, out), where the model's layers have (out, in).
    """

    names: tuple[str, ...]
    transposed: bool = False

    def stored_shape(self, shape: Shape) -> Shape:
        """Return the shape in the file of tensors that have ``shape`` in the model."""
        *rest, last = reversed(shape) if self.transposed else shape
        return (*rest, last * len(self.names))

    def split(self, stored: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield name and value of the model's tensors, as views."""
        for name, piece in zip(self.names, stored.chunk(len(self.names), dim=-1), strict=True):
            yield name, piece.t() if self.transposed else piece


@dataclass(frozen=True)
class Plan:
    """How to read one layout.

    ``facts``: what the stored names alone say of the model. ``parts``: by stored name, in the model's order.
    ``ignored``: stored names that carry nothing. ``needs_config``: tensors mean nothing without their ``config.json``.
    Without an ``out_head`` among the parts the model reuses ``tok_emb``.
    """

    facts: dict[str, Any]
    parts: dict[str, Part]
    ignored: frozenset[str] = frozenset()
    needs_config: bool = False


def empty_model(config: GPTConfig) -> GPTModel:
    """Return a model on the ``meta`` device: names and shapes without memory."""
    with torch.device("meta"):
        return GPTModel(config)


def shapes(model: GPTModel) -> dict[str, Shape]:
    """Return name and shape of every parameter and buffer, in the order of the state dict."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def count_blocks(pattern: str, names: Set[str]) -> int:
    """Count the different numbers that ``pattern`` captures at the start of a name; at least 1."""
    return max(1, len({match[1] for name in names if (match := re.match(pattern, name))}))


def book(names: Set[str]) -> Plan | None:
    """Recognise the state dict of the book's ``GPTModel``; the masks may be missing."""
    if "tok_emb.weight" not in names and not any(name.startswith("trf_blocks.") for name in names):
        return None
    n_layers = count_blocks(r"trf_blocks\.(\d+)\.", names)
    qkv_bias = any(name.endswith("att.W_query.bias") for name in names)
    tiny = GPTConfig(vocab_size=1, context_length=1, emb_dim=1, n_heads=1, n_layers=n_layers, qkv_bias=qkv_bias)
    parts = {name: Part((name,)) for name in shapes(empty_model(tiny)) if name in names or not name.endswith(".mask")}
    return Plan({"n_layers": n_layers, "qkv_bias": qkv_bias}, parts)
