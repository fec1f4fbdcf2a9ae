"""Which stored tensor becomes which of the model's: the plan of a checkpoint's layout."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .gpt import GPTConfig, GPTModel

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """The tensors of the model that one stored tensor holds, one below the other on its first axis.

    ``transposed``: the stored tensor is (in, out), where the model's layers have (out, in).
    """

    names: tuple[str, ...]
    transposed: bool = False

    def stored_shape(self, shape: Shape) -> Shape:
        """Return the shape in the file of tensors that have ``shape`` in the model."""
        first, *rest = shape
        joined = (first * len(self.names), *rest)
        return joined[::-1] if self.transposed else joined

    def split(self, stored: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield name and value of the model's tensors, as views."""
        joined = stored.t() if self.transposed else stored
        yield from zip(self.names, joined.chunk(len(self.names)), strict=True)

    def join(self, model: Mapping[str, Tensor]) -> Tensor:
        """Return the stored tensor of the model's: the inverse of :meth:`split`, copied where it is not one of them."""
        joined = torch.cat([model[name] for name in self.names]) if len(self.names) > 1 else model[self.names[0]]
        return joined.t().contiguous() if self.transposed else joined

    def under(self, prefix: str) -> "Part":
        """Return the same part of the block that ``prefix`` names."""
        return Part(tuple(prefix + name for name in self.names), self.transposed)


@dataclass(frozen=True)
class Plan:
    """How to read one layout.

    ``facts``: what the stored tensors alone say of the model. ``defaults``: settings that leave no trace in them, where
    nobody states another. ``parts``: by stored name, in the model's order. ``zeros``: the model's tensors that the
    layout leaves out because they are zero. ``ignored``: stored names that carry nothing. ``config_file``: the name of
    what lies beside the tensors; ``needs_config``: they mean nothing without it. Without an ``out_head`` among the
    parts the model reuses ``tok_emb``. ``n_classes``: the head is a classifier's, of so many classes and with a bias.
    """

    facts: dict[str, Any]
    parts: dict[str, Part]
    defaults: dict[str, Any] = field(default_factory=dict)
    zeros: tuple[str, ...] = ()
    ignored: frozenset[str] = frozenset()
    config_file: str = ""
    needs_config: bool = False
    n_classes: int | None = None


def empty_model(config: GPTConfig) -> GPTModel:
    """Return a model on the ``meta`` device: names and shapes without memory."""
    with torch.device("meta"):
        return GPTModel(config)


def shapes(model: GPTModel) -> dict[str, Shape]:
    """Return name and shape of every parameter and buffer, in the order of the state dict."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def count_blocks(pattern: str, names: Iterable[str]) -> int:
    """Count the different numbers that ``pattern`` captures at the start of a name; at least 1."""
    return max(1, len({match[1] for name in names if (match := re.match(pattern, name))}))
