"""Make the matrices of a model integers of 8 or 4 bits, layer by layer, on a text that shows what its layers see."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gptedge_models import GPTModel
from gptedge_runtime.bench import LARGE_HEAD
from torch import Tensor, nn
from tqdm import tqdm

from .blocks import Blocks, in_blocks, round_activations, round_by_inputs, round_cache, round_rows, round_to_nearest
from .shortlist import ROUGH_BITS

TABLE_BITS = 8
"""Of the token table at each precision: a row is read for each token, so it costs size and no speed."""

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Quantised:
    """``model`` has the rounded weights; ``weights`` are the same as integers, layers of one input joined.

    The keys and values that ``model`` computes are whole numbers of 8 bits. ``rough_head`` is the head once more, where
    ``decode.onnx`` looks at it twice.
    """

    model: GPTModel
    bits: int
    head_bits: int
    weights: list[Blocks]
    rough_head: Blocks | None

    @contextlib.contextmanager
    def as_computed(self, n_prefilled: int = 0, activation_max: int = 127) -> Iterator[None]:
        """Let the layers of ``model`` round their inputs, too, as the kernels do; so many tokens, as prefill.onnx."""
        hook = _round_input(self.bits, n_prefilled, activation_max)
        handles = [layer.register_forward_pre_hook(hook) for layer in _layers(self.model.trf_blocks)]
        handles.append(self.model.out_head.register_forward_pre_hook(_round_input(self.head_bits)))
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
    head_bits, head = TABLE_BITS if tied else bits, model.out_head.weight
    is_looked_at_twice = head_bits > ROUGH_BITS and head.numel() >= LARGE_HEAD
    rough_head = round_to_nearest(head, ROUGH_BITS) if is_looked_at_twice else None
    rounded = Quantised(copy.deepcopy(model).eval(), bits, head_bits, [], rough_head)
    model = rounded.model
    model.out_head.weight = nn.Parameter(model.out_head.weight.clone())  # it may be the table itself
    table = round_to_nearest(model.tok_emb.weight, TABLE_BITS)
    with rounded.as_computed():
        inputs = [_embed(model, torch.tensor([ids])) for ids in texts]
        blocks: list[Any] = [*model.trf_blocks]
        for block in tqdm(blocks, desc="quantise", unit=" layers", disable=not progress, leave=False):
            att, (up, _, down) = block.att, block.ff.layers
            _smooth(block, inputs)
            groups = [[att.W_query, att.W_key, att.W_value], [att.out_proj], [up], [down]]
            rounded.weights.extend(_round_layers(groups, bits, inputs, block, by_row=True))
            for layer in (att.W_key, att.W_value):
                layer.register_forward_hook(_round_output)
            inputs = [block(x) for x in inputs]
        rounded.weights.extend(_round_layers([[model.out_head]], rounded.head_bits, inputs, _head(model)))
    if tied:
        table = rounded.weights[-1]
    rounded.weights.append(table)
    model.tok_emb.weight = nn.Parameter(table.dense())
    return rounded


def _round_input(bits: int, n_prefilled: int = 0, activation_max: int = 127) -> Any:
    def rounded(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        prompt, rest = inputs[0][:, :n_prefilled], inputs[0][:, n_prefilled:]  # (B, T, K)
        return torch.cat((round_rows(prompt, activation_max), round_activations(rest, bits)), dim=1)

    return rounded


def _round_output(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return round_cache(output)


def _layers(blocks: nn.Module) -> list[nn.Linear]:
    return [module for module in blocks.modules() if isinstance(module, nn.Linear)]


def _embed(model: GPTModel, ids: Tensor) -> Tensor:
    x: Tensor = model.tok_emb(ids) + model.pos_emb(torch.arange(ids.shape[1]))  # (1, T, D)
    return x


def _head(model: GPTModel) -> Run:
    return lambda x: model.out_head(model.final_norm(x))


def _round_layers(
    groups: list[list[Any]], bits: int, inputs: list[Tensor], run: Run, *, by_row: bool = False
) -> Iterator[Blocks]:
    """Round groups of layers, those of a group having one input; ``run`` passes an input (1, T, D) through them."""
    moments = _moments([group[0] for group in groups], bits, inputs, run)
    for group, moment in zip(groups, moments, strict=True):
        blocks = round_by_inputs(torch.cat([layer.weight for layer in group]), bits, moment, by_row=by_row)
        for layer, weight in zip(group, blocks.dense().chunk(len(group)), strict=True):
            layer.weight = nn.Parameter(weight)
        yield blocks


def _moments(layers: list[nn.Linear], bits: int, inputs: list[Tensor], run: Run) -> list[Tensor]:
    """Sum of x x^T over all inputs x of each layer, float64 (K', K')."""
    sums = []

    def watch(layer: nn.Linear) -> Any:
        size = in_blocks(layer.weight[:1], bits).numel()
        total = torch.zeros(size, size, dtype=torch.float64)
        sums.append(total)

        def add(_: nn.Module, inputs: tuple[Tensor]) -> None:
            x = in_blocks(inputs[0], bits).flatten(-2).flatten(0, 1)  # (T, K')
            total.add_(x.T @ x)

        return layer.register_forward_pre_hook(add)

    handles = [watch(layer) for layer in layers]
    for x in inputs:
        run(x)
    for handle in handles:
        handle.remove()
    return sums


def _smooth(block: Any, inputs: list[Tensor]) -> None:
    """Even out the channels behind each norm: what the norm's output loses in size, the weights that read it gain.

    The block computes what it did; a channel far larger than the others no longer takes the bits of its neighbours
    (SmoothQuant: Xiao et al., 2022, arXiv 2211.10438, with its alpha of 0.5). In the same way the channels of keys and
    values come to fill 8 bits, which hold a tenth more than the largest seen; queries and ``out_proj`` make up for it.
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
    key_steps, value_steps = (reaches[2:] * 1.1 / 127).clamp(min=1e-6)  # (D,)
    for layer, factors in ((att.W_query, key_steps), (att.W_key, 1 / key_steps), (att.W_value, 1 / value_steps)):
        layer.weight.mul_(factors[:, None])
        if layer.bias is not None:
            layer.bias.mul_(factors)
    att.out_proj.weight.mul_(value_steps)


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
