"""The graph that CUDA runs, which the runtime's ``--provider cuda`` opens. Shapes are those of graphs.py."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .graphs import Attend, Decode, Norm, additive, attention, heads, widen

CUDA_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""In which ``decode_cuda`` computes, by precision; there is none at the others."""


class DecodeOnCuda(Decode):
    """``decode_cuda.onnx``: what ``decode.onnx`` computes, as CUDA can, and the most likely ids beside the logits.

    A decode step is as long as its kernels are many: bias, residual and norm are one operator here, and so are bias and
    GELU. CUDA's GroupQueryAttention takes 16 bits alone: in float32 standard operators stand in its place.
    """

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
        logit_positions: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        batch_size, present = input_ids.shape[0], list[tuple[Tensor, Tensor]]()
        if past[0][0].dtype == torch.float32:
            attend = self.attend_by_standard_operators(batch_size, position_ids, past, present)
        else:
            attend = self.attend_in_place(batch_size, seqlens_k, total_sequence_length, past, present)
        blocks: list[Any] = [*self.blocks]
        x = self.embed(input_ids, position_ids)  # (B*S, D)
        normed = blocks[0].norm1(x)
        for layer, block in enumerate(blocks):
            context = F.linear(attend(layer, block.qkv(normed)), block.out_proj.weight)
            normed, x = add_and_norm(context, block.out_proj.bias, x, block.norm2)
            widened = F.linear(widen_and_gelu(normed, block), block.down.weight)
            following = blocks[layer + 1].norm1 if layer + 1 < len(blocks) else self.final_norm
            normed, x = add_and_norm(widened, block.down.bias, x, following)
        normed = normed.view(batch_size, -1, self.config.emb_dim)  # (B, S, D)
        wanted = logit_positions[..., None].expand(-1, -1, self.config.emb_dim)
        logits = self.out_head(normed.gather(1, wanted).flatten(0, 1)).float()  # (B * logit_count, V)
        logits = logits.view(*logit_positions.shape, self.out_head.out_features)
        return logits, best_ids(logits), present

    def attend_by_standard_operators(
        self,
        batch_size: int,
        position_ids: Tensor,
        past: list[tuple[Tensor, Tensor]],
        present: list[tuple[Tensor, Tensor]],
    ) -> Attend:
        """The same over the whole buffers; a token's place in them is its position."""
        config, width = self.config, past[0][0].shape[3]
        places = torch.arange(past[0][0].shape[2])
        bias = additive(places <= position_ids[:, None, :, None])  # (B, 1, S, max_sequence_length)
        rows = position_ids[:, None, :, None].expand(-1, config.n_heads, -1, width)  # (B, n_heads, S, width)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            q, k, v = (
                widen(heads(x, config, batch_size), width) for x in qkv.chunk(3, dim=-1)
            )  # (B, n_heads, S, width)
            k, v = past[layer][0].scatter(2, rows, k), past[layer][1].scatter(2, rows, v)
            present.append((k, v))
            q = q * (width / config.head_dim) ** 0.5  # attention() divides by the root of its width
            context = attention(q, k, v, bias)  # (B*S, n_heads * width)
            return context.view(-1, config.n_heads, width)[..., : config.head_dim].flatten(1)  # (B*S, D)

        return attend


def add_and_norm(x: Tensor, bias: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """``com.microsoft::SkipLayerNormalization``: (B*S, D) -> ``norm`` of ``x + bias + residual``, and that sum."""
    columns = (x.shape[0], 1)
    out: Sequence[Tensor] = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::SkipLayerNormalization",
        [x, residual, norm.weight, norm.bias, bias],
        {"epsilon": norm.eps},
        dtypes=[x.dtype, torch.float32, torch.float32, x.dtype],
        shapes=[x.shape, columns, columns, x.shape],
        version=1,
    )
    return out[0], out[3]


def widen_and_gelu(x: Tensor, block: Any) -> Tensor:
    """A block's wide layer and its GELU, (B*S, D) -> (B*S, 4D); ``com.microsoft::FastGelu`` is the one by tanh."""
    if block.gelu != "tanh":
        return F.gelu(block.up(x))
    x = F.linear(x, block.up.weight)  # (B*S, 4D)
    inputs = [x, block.up.bias]
    out: Tensor = torch.onnx.ops.symbolic("com.microsoft::FastGelu", inputs, dtype=x.dtype, shape=x.shape, version=1)
    return out


def best_ids(logits: Tensor) -> Tensor:
    """(B, logit_count, V) -> the most likely ids, int64 (B, logit_count); -1 where a logit is not finite."""
    finite = logits.sum(-1) * 0 == 0
    return torch.where(finite, logits.argmax(-1), -1)
