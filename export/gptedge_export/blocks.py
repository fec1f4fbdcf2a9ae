"""Weights of few bits: integers in blocks along the input axis, one scale a block, as ``MatMulNBits`` stores them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

BLOCK_SIZES = (256, 128, 64, 32, 16)
"""Those of ``MatMulNBits``."""

MAX_BLOCK_SIZE = {8: 64, 4: 256}
"""By bits. Up to 64 the kernel for 8 bits gives a row the same bits alone and among others, so that batches and drafts
turn no token. For 4 bits the largest block is the fastest with VNNI, a tenth behind without (docs/performance.md)."""

MULTIPLES = {8: [1], 4: [*range(-15, 0), *range(1, 16)]}
"""By bits: how often the step of a row may be in a scale. Times an integer of so many bits it is one of 8 bits."""

LEAST = 1e-12
"""A row of activations that is all but zero has the scale of one with this largest magnitude."""

_DAMPING = 0.01
_SCALES = torch.linspace(0.7, 1.1, 17).tolist()


@dataclass(frozen=True)
class Blocks:
    """A weight (N, K): ``integers`` int8 (N, n_blocks, block_size) times ``scales`` float32 (N, n_blocks, 1).

    Past K the last block is filled up with zeros. With ``steps`` float32 (N, 1) the scales of a row are whole multiples
    of its step, and so are its weights: from -128 to 127.
    """

    integers: Tensor
    scales: Tensor
    bits: int
    width: int
    steps: Tensor | None = None

    def dense(self) -> Tensor:
        """Return the weight, float32 (N, K)."""
        weight: Tensor = (self.integers * self.scales).flatten(1)[:, : self.width].contiguous()
        return weight

    def packed(self) -> Tensor:
        """Return uint8 (N, n_blocks, block_size * bits / 8), zero in the middle, the first integer in the low bits."""
        unsigned: Tensor = (self.integers.to(torch.int16) + 2 ** (self.bits - 1)).to(torch.uint8)
        return unsigned if self.bits == 8 else unsigned[..., 0::2] | unsigned[..., 1::2] << 4


def block_size(width: int, bits: int) -> int:
    """Return how many of ``width`` inputs share a scale: a third at most, and with a sixteenth of filling at most."""
    for size in BLOCK_SIZES:
        if size <= MAX_BLOCK_SIZE[bits] and 3 * size <= width and -width % size <= width // 16:
            return size
    return BLOCK_SIZES[-1]


def in_blocks(x: Tensor, bits: int) -> Tensor:
    """Cut the last axis for weights of so many bits: (..., K) -> (..., n_blocks, block_size), filled up with zeros."""
    size = block_size(x.shape[-1], bits)
    return F.pad(x, (0, -x.shape[-1] % size)).reshape(*x.shape[:-1], -1, size)


def round_activations(x: Tensor, bits: int) -> Tensor:
    """Return ``x`` (..., K) as ``MatMulNBits`` of accuracy level 4 reads it: 8 bits, scales for the weights' blocks."""
    blocks = in_blocks(x, bits)
    largest = blocks.abs().amax(-1, keepdim=True)
    return ((blocks * (127 / _nonzero(largest))).round() * (largest / 127)).flatten(-2)[..., : x.shape[-1]]


def round_rows(x: Tensor, activation_max: int) -> Tensor:
    """Return ``x`` (..., K) as ``prefill.onnx`` reads it: whole numbers up to that, one scale for each row."""
    steps = x.abs().amax(-1, keepdim=True).clamp(min=LEAST) / activation_max
    return (x / steps).round() * steps


def round_cache(x: Tensor) -> Tensor:
    """Return keys or values as a cache of 8 bits holds them: whole numbers."""
    return x.round().clamp(-128, 127)


def round_to_nearest(weight: Tensor, bits: int) -> Blocks:
    """Round float32 (N, K) with the scales that lose least."""
    blocks = in_blocks(weight, bits)
    scales = _best_scales(blocks, bits)
    return Blocks(_integers(blocks, scales, bits).to(torch.int8), scales, bits, weight.shape[1])


def round_by_inputs(weight: Tensor, bits: int, moments: Tensor, *, by_row: bool = False) -> Blocks:
    """Round float32 (N, K) column by column; what each rounding changes in the outputs, the columns after it mend.

    ``moments`` float64 (K', K') is the sum of x x^T over inputs x that the layer sees, K filled up to whole blocks
    (GPTQ: Frantar et al., 2022, arXiv 2210.17323, with the scale of a block chosen when its turn comes). ``by_row``:
    the scales of an output are multiples of its step.
    """
    blocks = in_blocks(weight, bits).clone()  # (N, n_blocks, block_size)
    size = blocks.shape[2]
    factor = _inverse_root(moments).float()  # (K', K'), upper triangular
    integers, scales = torch.empty_like(blocks), torch.empty_like(blocks[..., :1])
    steps = _row_steps(blocks, bits) if by_row else None
    for i in range(blocks.shape[1]):
        columns, errors = blocks[:, i], torch.empty_like(blocks[:, i])  # (N, block_size)
        scales[:, i] = _best_scales(columns, bits, steps)
        square = factor[i * size : (i + 1) * size]
        for j in range(size):
            place = i * size + j
            column = columns[:, [j]]
            integers[:, i, [j]] = _integers(column, scales[:, i], bits)
            errors[:, [j]] = (column - integers[:, i, [j]] * scales[:, i]) / square[j, place]
            columns[:, j:] -= errors[:, [j]] * square[j, place : (i + 1) * size]
        rest = blocks[:, i + 1 :]
        rest -= (errors @ square[:, (i + 1) * size :]).view_as(rest)
    return Blocks(integers.to(torch.int8), scales, bits, weight.shape[1], steps)


def _inverse_root(moments: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped moments."""
    damping = _DAMPING * moments.diagonal().mean() + 1e-8
    damped = moments + damping * torch.eye(len(moments), dtype=moments.dtype)
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return factor


def _row_steps(blocks: Tensor, bits: int) -> Tensor:
    """Return (N, 1) for blocks (N, n_blocks, block_size): at 8 bits the scale of all, at 4 a part of the largest."""
    if bits == 8:
        return _best_scales(blocks.flatten(1), bits)
    steps: Tensor = _best_scales(blocks, bits).abs().amax(1) / MULTIPLES[bits][-1]
    return steps


def _best_scales(blocks: Tensor, bits: int, steps: Tensor | None = None) -> Tensor:
    """Return scales (..., 1) for blocks (..., block_size): from several, the one of the least squared error.

    They are multiples of ``steps`` (..., 1). Without any the value of the largest magnitude falls on the lowest
    integer, of which there is one more than of positive ones.
    """
    if steps is None:
        extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        tried = (_nonzero(extreme * share / -(2 ** (bits - 1))) for share in _SCALES)
    else:
        tried = (steps * multiple for multiple in MULTIPLES[bits])
    best = least = None
    for scales in tried:
        error = (_integers(blocks, scales, bits) * scales - blocks).square_().sum(-1, keepdim=True)
        best = scales if best is None or least is None else torch.where(error < least, scales, best)
        least = error if least is None else torch.minimum(error, least)
    assert best is not None
    return best


def _integers(x: Tensor, scales: Tensor, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    return (x / scales).round_().clamp_(-half, half - 1)


def _nonzero(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 1.0, scales)
