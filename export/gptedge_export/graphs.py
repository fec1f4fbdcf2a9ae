"""The ONNX graphs of a GPT, each a small PyTorch module around the same weights; trace.py exports them.

Linear layers see two axes, (B*S, D): they become ``Gemm`` with ``transB=1``, so that weights keep PyTorch's layout and
a weight that two layers share is stored once. In the shapes below B is the batch, S the new tokens, P the cached ones,
D the width ``emb_dim`` and V the vocabulary size.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from gptedge_models import GPTConfig, GPTModel
from gptedge_models.gpt import LayerNorm
from torch import Tensor, nn

from .blocks import round_cache

Attend = Callable[[int, Tensor], Tensor]
"""Layer number and packed query, key, value (B*S, 3D) -> context (B*S, D)."""


class Norm(nn.Module):
    """The book's LayerNorm as one operator."""

    def __init__(self, norm: LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.scale, norm.shift, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


def pack(layers: Sequence[nn.Linear]) -> nn.Linear:
    """Join linear layers of one input into one whose outputs stand side by side."""
    with torch.device("meta"):
        width = sum(layer.out_features for layer in layers)
        packed = nn.Linear(layers[0].in_features, width, bias=layers[0].bias is not None)
    packed.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    if packed.bias is not None:
        packed.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    return packed


class Block(nn.Module):
    """The book's TransformerBlock over (B*S, D), with its attention handed in."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        att = block.att
        self.norm1, self.norm2 = Norm(block.norm1), Norm(block.norm2)
        self.qkv = pack([att.W_query, att.W_key, att.W_value])
        self.out_proj = att.out_proj
        self.up, self.down = block.ff.layers[0], block.ff.layers[2]
        self.gelu = "none" if isinstance(block.ff.layers[1], nn.GELU) else "tanh"

    def forward(self, x: Tensor, layer: int, attend: Attend) -> Tensor:
        return self.after(attend(layer, self.qkv(self.norm1(x))), x)

    def after(self, context: Tensor, x: Tensor) -> Tensor:
        """What follows the attention: each row by itself."""
        x = x + self.out_proj(context)
        out: Tensor = x + self.down(self.activate(self.up(self.norm2(x))))
        return out

    def activate(self, widened: Tensor) -> Tensor:
        return F.gelu(widened, approximate=self.gelu)  # (B*S, 4D)


class PromptBlock(Block):
    """The same between layers that take and give columns, as those of ``prefill.onnx`` do: two transpositions fewer."""

    def activate(self, widened: Tensor) -> Tensor:
        return super().activate(widened.T).T


class Stack(nn.Module):
    """Everything of a GPT but the attention; it holds the model's own tensors, and no dropout.

    With ``int8_cache`` its keys and values are whole numbers of 8 bits.
    """

    block: type[Block] = Block

    def __init__(self, model: GPTModel, int8_cache: bool = False) -> None:
        super().__init__()
        self.config, self.int8_cache = model.config, int8_cache
        self.tok_emb, self.pos_emb = model.tok_emb, model.pos_emb
        self.blocks = nn.ModuleList(self.block(block) for block in model.trf_blocks)
        self.final_norm = Norm(model.final_norm)
        self.out_head = model.out_head

    def hidden(self, input_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """Token ids (B, S) and positions (B, S) or (S,) -> (B*S, D), before the final norm."""
        x = self.before_last(input_ids, position_ids, attend)
        out: Tensor = self.blocks[-1](x, self.config.n_layers - 1, attend)
        return out

    def before_last(self, input_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """Token ids (B, S) and positions (B, S) or (S,) -> (B*S, D), before the last block."""
        x = self.embed(input_ids, position_ids)  # (B*S, D)
        for layer, block in enumerate(self.blocks[:-1]):
            x = block(x, layer, attend)
        return x

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Token ids (B, S) and positions (B, S) or (S,) -> (B*S, D)."""
        x: Tensor = self.tok_emb(input_ids) + self.pos_emb(position_ids)  # (B, S, D)
        return x.flatten(0, 1)

    def split(self, layer: int, qkv: Tensor, batch_size: int) -> Iterator[Tensor]:
        """Packed query, key, value (B*S, 3D) -> each of them (B, n_heads, S, head_dim)."""
        q, kv = qkv.tensor_split((self.config.emb_dim,), dim=-1)
        if self.int8_cache:
            kv = round_cache(kv)
        return (heads(x, self.config, batch_size) for x in (q, *kv.chunk(2, dim=-1)))

    def logits(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """(B*S, D) -> (B, S, V), where ``shape`` is (B, S); a classifier has its classes where V stands."""
        logits: Tensor = self.out_head(self.final_norm(x))  # (B*S, V)
        return logits.view(*shape, self.out_head.out_features)


def pick(x: Tensor, positions: Tensor) -> Tensor:
    """Of (B*S, D) the rows at positions (B, logit_count) of their sequences, (B * logit_count, D)."""
    (batch_size, count), width = positions.shape, x.shape[-1]
    inputs = [x.view(batch_size, -1, width), positions[..., None]]
    shape = (batch_size, count, width)
    return torch.onnx.ops.symbolic("GatherND", inputs, {"batch_dims": 1}, dtype=x.dtype, shape=shape).flatten(0, 1)


def heads(x: Tensor, config: GPTConfig, batch_size: int) -> Tensor:
    """(B*S, D) -> (B, n_heads, S, head_dim)."""
    return x.view(batch_size, -1, config.n_heads, config.head_dim).transpose(1, 2)


def widen(x: Tensor, width: int) -> Tensor:
    """Fill the last axis up with zeros; CUDA's ``Pad`` takes no bfloat16."""
    if width == x.shape[-1]:
        return x
    widened = F.pad(x.float() if x.dtype == torch.bfloat16 else x, (0, width - x.shape[-1]))
    return widened.to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Scaled dot-product attention, (B, n_heads, S, head_dim) over (B, n_heads, P+S, head_dim) -> (B*S, D)."""
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + bias  # (B, n_heads, S, P+S)
    context = torch.softmax(scores, dim=-1) @ v  # (B, n_heads, S, head_dim)
    return context.transpose(1, 2).flatten(2).flatten(0, 1)


def additive(allowed: Tensor) -> Tensor:
    """0 where attention is allowed, else the least float32: a row with nothing allowed (padding) stays finite."""
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)


class Forward(Stack):
    """``forward.onnx``: the book's forward, ids (B, S) -> logits (B, S, V)."""

    def forward(self, input_ids: Tensor) -> Tensor:
        batch_size, length = input_ids.shape
        positions = torch.arange(length)
        bias = additive(positions[:, None] >= positions)  # (S, S)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            q, k, v = self.split(layer, qkv, batch_size)
            return attention(q, k, v, bias)

        return self.logits(self.hidden(input_ids, positions, attend), input_ids.shape)


class Cached(Stack):
    """``model.onnx``: standard operators; the cache goes in and out, and padding on the left is masked."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        batch_size, length = input_ids.shape
        past_length = past[0][0].shape[2]
        keys = torch.arange(past_length + length)
        causal = keys <= torch.arange(length)[:, None] + past_length  # (S, P+S)
        bias = additive(causal & attention_mask.bool()[:, None, None, :])  # (B, 1, S, P+S)
        present: list[tuple[Tensor, Tensor]] = []

        def attend(layer: int, qkv: Tensor) -> Tensor:
            q, k, v = self.split(layer, qkv, batch_size)
            k, v = torch.cat((past[layer][0], k), dim=2), torch.cat((past[layer][1], v), dim=2)
            present.append((k, v))
            return attention(q, k, v, bias)

        x = self.hidden(input_ids, position_ids, attend)  # (B*S, D)
        return self.logits(x, input_ids.shape), present


class Decode(Stack):
    """``decode.onnx``: the runtime's graph, one ``com.microsoft::GroupQueryAttention`` a layer on buffers in place."""

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
        logit_positions: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        batch_size, present = input_ids.shape[0], list[tuple[Tensor, Tensor]]()
        attend = self.attend_in_place(batch_size, seqlens_k, total_sequence_length, past, present)
        x = self.before_last(input_ids, position_ids, attend)  # (B*S, D)
        last: Any = self.blocks[-1]
        context = attend(self.config.n_layers - 1, last.qkv(last.norm1(x)))
        x = last.after(pick(context, logit_positions), pick(x, logit_positions))  # (B * logit_count, D)
        return self.logits(x, logit_positions.shape), present

    def attend_in_place(
        self,
        batch_size: int,
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
        past: list[tuple[Tensor, Tensor]],
        present: list[tuple[Tensor, Tensor]],
    ) -> Attend:
        """Attention over buffers (B, n_heads, max_sequence_length, width), which it appends to ``present``."""
        n_heads, head_dim, width = self.config.n_heads, self.config.head_dim, cache_width("decode", self.config)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            if width > head_dim:
                qkv = widen(qkv.view(-1, 3 * n_heads, head_dim), width)
            qkv = qkv.view(batch_size, -1, 3 * n_heads * width)  # (B, S, 3 * n_heads * width)
            k, v = past[layer]
            inputs = [qkv, None, None, k, v, seqlens_k, total_sequence_length]
            attributes = {"num_heads": n_heads, "kv_num_heads": n_heads, "do_rotary": 0, "scale": head_dim**-0.5}
            if self.int8_cache:
                inputs += [*[None] * 5, *[torch.ones(1)] * 2]  # the scales
                attributes |= {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}
            context, k, v = torch.onnx.ops.symbolic_multi_out(
                "com.microsoft::GroupQueryAttention",
                inputs,
                attributes,
                dtypes=[qkv.dtype, k.dtype, v.dtype],
                shapes=[(*qkv.shape[:2], n_heads * width), k.shape, v.shape],
                version=1,
            )
            present.append((k, v))
            return context.view(-1, n_heads, width)[..., :head_dim].flatten(1)  # (B*S, D)

        return attend


def round_to_int8(x: Tensor) -> Tensor:
    """:func:`round_cache` as one operator."""
    inputs = [x, torch.ones(()), torch.zeros((), dtype=torch.int8)]
    return torch.onnx.ops.symbolic("QuantizeLinear", inputs, dtype=torch.int8, shape=x.shape)


class Prefill(Stack):
    """``prefill.onnx``: keys and values of a part of a prompt, ids (1, S) behind a past of P, and no logits; S > 1.

    Both are int8 (1, n_heads, P, width) in and (1, n_heads, S, width) out, for each layer. What follows a prompt is
    chosen where ``decode.onnx`` reads its last token.
    """

    block = PromptBlock

    def forward(self, input_ids: Tensor, past: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        config, width = self.config, past[0][0].shape[3]
        length, past_length = input_ids.shape[1], past[0][0].shape[2]
        present: list[tuple[Tensor, Tensor]] = []

        def split(qkv: Tensor) -> list[Tensor]:
            """Query, key and value, (1, S, n_heads, width) each; the latter two are int8, and kept."""
            q, kv = qkv.T.split_with_sizes((config.emb_dim, 2 * config.emb_dim))  # (D, S), (2D, S)
            rows = (q.T, *round_to_int8(kv).T.chunk(2, dim=-1))  # (S, D) each
            q, k, v = (widen(x.reshape(1, length, config.n_heads, config.head_dim), width) for x in rows)
            present.append((k.transpose(1, 2), v.transpose(1, 2)))
            return [q, k, v]

        half = length // 2
        parts = (half, length - half)  # a query of the first half does without the keys of the second

        def attend(layer: int, qkv: Tensor) -> Tensor:
            cached, contexts, end = [x.float() for x in past[layer]], list[Tensor](), past_length
            for part in zip(*(x.split_with_sizes(parts, dim=1) for x in split(qkv)), strict=True):
                q, k, v = (x.float().flatten(2) for x in part)  # (1, S / 2, n_heads * width)
                end += q.shape[1]
                total = torch.full((), end, dtype=torch.int32)
                context, *cached = torch.onnx.ops.symbolic_multi_out(
                    "com.microsoft::GroupQueryAttention",
                    [q, k, v, *cached, total.view(1) - 1, total],
                    {
                        "num_heads": config.n_heads,
                        "kv_num_heads": config.n_heads,
                        "do_rotary": 0,
                        "scale": config.head_dim**-0.5,
                    },
                    dtypes=[q.dtype] * 3,
                    shapes=[q.shape, *[(1, config.n_heads, end, width)] * 2],
                    version=1,
                )
                contexts.append(context)
            context = torch.cat(contexts, dim=1)  # (1, S, n_heads * width)
            return context.view(-1, config.n_heads, width)[..., : config.head_dim].flatten(1)  # (S, D)

        x = self.before_last(input_ids, past_length + torch.arange(length), attend)  # (S, D)
        last: Any = self.blocks[-1]
        split(last.qkv(last.norm1(x)))
        return present


IN_PLACE = ("decode", "decode_cuda")
"""The graphs whose cache stays in its buffers."""


def cache_names(prefix: str, config: GPTConfig) -> list[str]:
    """``prefix.0.key``, ``prefix.0.value``, ``prefix.1.key``, ..."""
    return [f"{prefix}.{layer}.{part}" for layer in range(config.n_layers) for part in ("key", "value")]


def cache_width(name: str, config: GPTConfig) -> int:
    """Width of a head in the cache: ``GroupQueryAttention`` takes multiples of 8, the rest is filled with zeros."""
    return -(-config.head_dim // 8) * 8 if name in (*IN_PLACE, "prefill") else config.head_dim
