"""The GPT of *Build a Large Language Model (From Scratch)* (S. Raschka, 2024), chapter 4.

Attribute names, the order in which modules are created and their initialisation are the book's: its state dicts load
as they are, and one seed gives the book's weights. In the shapes below B is the batch, T the number of tokens, D the
width ``emb_dim`` and V the vocabulary size.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes of a GPT; the defaults are the book's ``GPT_CONFIG_124M``.

    ``exact_gelu``: GELU itself instead of its tanh approximation, as nanoGPT has it and the book and GPT-2 do not.
    Raises ``ValueError`` where a value is out of range or ``emb_dim`` is not a multiple of ``n_heads``.
    """

    vocab_size: int = 50257
    context_length: int = 1024
    emb_dim: int = 768
    n_heads: int = 12
    n_layers: int = 12
    drop_rate: float = 0.1
    qkv_bias: bool = False
    exact_gelu: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}: give a whole number of at least 1")
        if not isinstance(self.drop_rate, int | float) or not 0 <= self.drop_rate < 1:
            raise ValueError(f"drop_rate is {self.drop_rate!r}: give a number from 0 up to, but not including, 1")
        for name in ("qkv_bias", "exact_gelu"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} is {getattr(self, name)!r}: give true or false")
        if self.emb_dim % self.n_heads:
            raise ValueError(
                f"emb_dim {self.emb_dim} is not a multiple of n_heads {self.n_heads}: choose sizes that divide"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.emb_dim // self.n_heads

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GPTConfig":
        """Read the book's dict of settings; raises ``ValueError`` for a key that is unknown or missing."""
        known = {field.name for field in fields(cls)}
        required = known - {"drop_rate", "qkv_bias", "exact_gelu"}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"config has unknown keys {', '.join(unknown)}: known are {', '.join(sorted(known))}")
        if missing := sorted(required - set(values)):
            raise ValueError(f"config lacks {', '.join(missing)}: add them")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the book's dict of settings, and ``exact_gelu`` only where it is true."""
        return {name: value for name, value in asdict(self).items() if name != "exact_gelu" or value}


CONFIGS: Mapping[str, GPTConfig] = {
    "gpt2-small": GPTConfig(),
    "gpt2-medium": GPTConfig(emb_dim=1024, n_layers=24, n_heads=16),
    "gpt2-large": GPTConfig(emb_dim=1280, n_layers=36, n_heads=20),
    "gpt2-xl": GPTConfig(emb_dim=1600, n_layers=48, n_heads=25),
}


class LayerNorm(nn.Module):
    """Normalise the last axis to mean 0 and variance 1, then scale and shift (book, section 4.2)."""

    def __init__(self, emb_dim: int) -> None:
        super().__init__()
        self.eps = 1e-5
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=-1, keepdim=True)
        var = x.var(dim=-1, keepdim=True, unbiased=False)
        return self.scale * ((x - mean) / torch.sqrt(var + self.eps)) + self.shift


class GELU(nn.Module):
    """The tanh approximation of GELU (Hendrycks and Gimpel, 2016; book, section 4.3)."""

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.sqrt(torch.tensor(2.0 / torch.pi)) * (x + 0.044715 * torch.pow(x, 3))
        return 0.5 * x * (1 + torch.tanh(inner))


class FeedForward(nn.Module):
    """Widen to 4 D, apply GELU, narrow back (book, section 4.3)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(config.emb_dim, 4 * config.emb_dim),
            nn.GELU() if config.exact_gelu else GELU(),
            nn.Linear(4 * config.emb_dim, config.emb_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class MultiHeadAttention(nn.Module):
    """Causal attention with separate query, key and value projections (book, section 3.6)."""

    mask: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        dim = config.emb_dim
        self.num_heads = config.n_heads
        self.head_dim = config.head_dim
        self.W_query = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.W_key = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.W_value = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.out_proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(config.drop_rate)
        ones = torch.ones(config.context_length, config.context_length)
        self.register_buffer("mask", torch.triu(ones, diagonal=1))

    def forward(self, x: Tensor) -> Tensor:
        b, t, dim = x.shape
        keys, queries, values = self.W_key(x), self.W_query(x), self.W_value(x)
        keys = keys.view(b, t, self.num_heads, self.head_dim).transpose(1, 2)  # (B, n_heads, T, head_dim)
        queries = queries.view(b, t, self.num_heads, self.head_dim).transpose(1, 2)
        values = values.view(b, t, self.num_heads, self.head_dim).transpose(1, 2)

        scores = queries @ keys.transpose(2, 3)  # (B, n_heads, T, T)
        scores.masked_fill_(self.mask.bool()[:t, :t], -torch.inf)
        weights = self.dropout(torch.softmax(scores / self.head_dim**0.5, dim=-1))

        context = (weights @ values).transpose(1, 2).reshape(b, t, dim)  # (B, T, D)
        out: Tensor = self.out_proj(context)
        return out


class TransformerBlock(nn.Module):
    """Attention, then the feed-forward network, each behind a norm and beside a residual connection (section 4.5)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.att = MultiHeadAttention(config)
        self.ff = FeedForward(config)
        self.norm1 = LayerNorm(config.emb_dim)
        self.norm2 = LayerNorm(config.emb_dim)
        self.drop_shortcut = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_shortcut(self.att(self.norm1(x)))
        out: Tensor = x + self.drop_shortcut(self.ff(self.norm2(x)))
        return out


class GPTModel(nn.Module):
    """Token ids to logits (book, section 4.6). ``config`` is a :class:`GPTConfig` or the book's dict."""

    def __init__(self, config: GPTConfig | Mapping[str, Any]) -> None:
        super().__init__()
        if not isinstance(config, GPTConfig):
            config = GPTConfig.from_dict(config)
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.Sequential(*[TransformerBlock(config) for _ in range(config.n_layers)])
        self.final_norm = LayerNorm(config.emb_dim)
        self.out_head = nn.Linear(config.emb_dim, config.vocab_size, bias=False)

    def forward(self, in_idx: Tensor) -> Tensor:
        """Return logits float32 (B, T, V) for token ids int64 (B, T), 1 <= T <= ``context_length``.

        Raises ``TypeError`` for another dtype, ``ValueError`` for another shape, too long a sequence or an id that
        is not in the vocabulary.
        """
        self._check(in_idx)
        tokens = self.tok_emb(in_idx)  # (B, T, D)
        positions = self.pos_emb(torch.arange(in_idx.shape[1], device=in_idx.device))  # (T, D)
        x = self.drop_emb(tokens + positions)
        x = self.final_norm(self.trf_blocks(x))
        logits: Tensor = self.out_head(x)  # (B, T, V)
        return logits

    def _check(self, in_idx: Tensor) -> None:
        if in_idx.dtype != torch.int64:
            raise TypeError(f"token ids are {in_idx.dtype}: give int64")
        if in_idx.ndim != 2 or 0 in in_idx.shape:
            raise ValueError(f"token ids have shape {tuple(in_idx.shape)}: give (B, T), both at least 1")
        if in_idx.shape[1] > self.config.context_length:
            raise ValueError(
                f"sequence has {in_idx.shape[1]:,} tokens; the model reads at most "
                f"{self.config.context_length:,}: shorten it"
            )
        low, high = int(in_idx.min()), int(in_idx.max())
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"token id {wrong} is outside the vocabulary 0..{self.config.vocab_size - 1}")


@torch.no_grad()
def generate_text_simple(model: nn.Module, idx: Tensor, max_new_tokens: int, context_size: int) -> Tensor:
    """Append ``max_new_tokens`` greedy tokens to ids int64 (B, T); returns int64 (B, T + max_new_tokens).

    Each step reads the last ``context_size`` ids and counts their positions from 0 (book, section 4.7).
    """
    for _ in range(max_new_tokens):
        logits = model(idx[:, -context_size:])[:, -1, :]  # (B, V)
        next_id = torch.argmax(logits, dim=-1, keepdim=True)  # (B, 1)
        idx = torch.cat((idx, next_id), dim=1)
    return idx
