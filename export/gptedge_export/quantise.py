"""Make the matrices of a model integers of 8 or 4 bits, layer by layer, on a text that shows what its layers see."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gptedge_models import GPTModel
from torch import Tensor, nn
from tqdm import tqdm

from .blocks import Blocks, in_blocks, round_activations, round_by_inputs, round_cache, round_to_nearest

TABLE_BITS = 8
"""Of the token table at each precision: a row is read for each token, so it costs size and no speed."""

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Quantised:
    """``model`` has the rounded weights; ``weights`` are the same as integers, layers of one input joined.

    The keys and values that ``model`` computes are those of a cache of 8 bits. ``cache_scales`` float32 (2D,) are, for
    each layer, the scales of the channels of its keys and, behind them, of its values.
    """

    model: GPTModel
    weights: list[Blocks]
    cache_scales: list[Tensor]

    @contextlib.contextmanager
    def as_computed(self) -> Iterator[None]:
        """Let the layers of ``model`` round their inputs, too, as the kernels do."""
        handles = [layer.register_forward_pre_hook(_round_input) for layer in _layers(self.model)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@torch.no_grad()
def quantise(model: GPTModel, bits: int, texts: Sequence[Sequence[int]], *, progress: bool = False) -> Quantised:
    """Return a copy of ``model`` with all matrices rounded; ``texts`` are token ids, each text within the context.

    A head that is tied to the token table stays tied, and has its bits. One block after the other sees the texts as the
    rounded blocks before it pass them on, so that it can mend their errors.
    """
    tied = torch.equal(model.tok_emb.weight, model.out_head.weight)
    rounded = Quantised(copy.deepcopy(model).eval(), [], [])
    model = rounded.model
    model.out_head.weight = nn.Parameter(model.out_head.weight.clone())  # it may be the table itself
    table = round_to_nearest(model.tok_emb.weight, TABLE_BITS)
    with rounded.as_computed():
        inputs = [_embed(model, torch.tensor([ids])) for ids in texts]
        blocks: list[Any] = [*model.trf_blocks]
        for block in tqdm(blocks, desc="quantise", unit=" layers", disable=not progress, leave=False):
            att, (up, _, down) = block.att, block.ff.layers
            scales = _smooth(block, inputs)
            groups = [[att.W_query, att.W_key, att.W_value], [att.out_proj], [up], [down]]
            rounded.weights.extend(_round_layers(groups, bits, inputs, block))
            rounded.cache_scales.append(scales.flatten())
            for layer, scale in zip((att.W_key, att.W_value), scales, strict=True):
                layer.register_forward_hook(_round_output(scale))
            inputs = [block(x) for x in inputs]
        head_bits = TABLE_BITS if tied else bits
        rounded.weights.extend(_round_layers([[model.out_head]], head_bits, inputs, _head(model)))
    if tied:
        table = rounded.weights[-1]
    rounded.weights.append(table)
    model.tok_emb.weight = nn.Parameter(table.dense())
    return rounded


def _round_input(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return round_activations(*inputs)


def _round_output(scales: Tensor) -> Any:
    return lambda _, __, output: round_cache(output, scales)


def _layers(model: GPTModel) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def _embed(model: GPTModel, ids: Tensor) -> Tensor:
    x: Tensor = model.tok_emb(ids) + model.pos_emb(torch.arange(ids.shape[1]))  # (1, T, D)
    return x


def _head(model: GPTModel) -> Run:
    return lambda x: model.out_head(model.final_norm(x))


def _round_layers(groups: list[list[Any]], bits: int, inputs: list[Tensor], run: Run) -> Iterator[Blocks]:
    """Round groups of layers, those of a group having one input; ``run`` passes an input (1, T, D) through them."""
    moments = _moments([group[0] for group in groups], inputs, run)
    for group, moment in zip(groups, moments, strict=True):
        blocks = round_by_inputs(torch.cat([layer.weight for layer in group]), bits, moment)
        for layer, weight in zip(group, blocks.dense().chunk(len(group)), strict=True):
            layer.weight = nn.Parameter(weight)
        yield blocks


def _moments(layers: list[nn.Linear], inputs: list[Tensor], run: Run) -> list[Tensor]:
    """Sum of x x^T over all inputs x of each layer, float64 (K', K')."""
    sums = []

    def watch(layer: nn.Linear) -> Any:
        size = in_blocks(layer.weight[:1]).numel()
        total = torch.zeros(size, size, dtype=torch.float64)
        sums.append(total)

        def add(_: nn.Module, inputs: tuple[Tensor]) -> None:
            x = in_blocks(inputs[0]).flatten(-2).flatten(0, 1)  # (T, K')
            total.add_(x.T @ x)

        return layer.register_forward_pre_hook(add)

    handles = [watch(layer) for layer in layers]
    for x in inputs:
        run(x)
    for handle in handles:
        handle.remove()
    return sums


def _smooth(block: Any, inputs: list[Tensor]) -> Tensor:
    """Even out the channels behind each norm: what the norm's output loses in size, the weights that read it gain.

    The block computes what it did; a channel far larger than the others no longer takes the bits of its neighbours
    (SmoothQuant: Xiao et al., 2022, arXiv 2211.10438, with its alpha of 0.5). Returns scales (2, D) with which 8 bits
    hold the block's keys and values, and a tenth more than the largest seen.
    """
    att = block.att
    readers = {block.norm1: [att.W_query, att.W_key, att.W_value], block.norm2: [block.ff.layers[0]]}
    reaches = _reaches([*readers, att.W_key, att.W_value], inputs, block)
    for (norm, layers), reach in zip(readers.items(), reaches, strict=False):
        weight = torch.cat([layer.weight for layer in layers]).abs().amax(0)  # (D,)
        factor = (reach / weight.clamp(min=1e-12)).sqrt()
        factor = (factor / factor.median().clamp(min=1e-12)).clamp(1e-3, 1e3)
        norm.scale.div_(factor)
        norm.shift.div_(factor)
        for layer in layers:
            layer.weight.mul_(factor)
    return (reaches[2:] * 1.1 / 127).clamp(min=1e-6)


def _reaches(layers: list[Any], inputs: list[Tensor], run: Run) -> Tensor:
    """Largest magnitude of each channel of what leaves each of these layers of width D, (layers, D)."""
    reaches = torch.zeros(len(layers), inputs[0].shape[-1])

    def watch(reach: Tensor) -> Any:
        def raise_to(_: nn.Module, __: Any, output: Tensor) -> None:
            torch.maximum(reach, output.abs().amax((0, 1)), out=reach)

        return raise_to

    handles = [layer.register_forward_hook(watch(reach)) for layer, reach in zip(layers, reaches, strict=True)]
    for x in inputs:
        run(x)
    for handle in handles:
        handle.remove()
    return reaches
