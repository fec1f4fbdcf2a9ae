"""The precisions of the weights: what each makes of a model, and of its graphs."""

import contextlib
import copy
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from gptedge_models import GPTModel
from numpy.typing import NDArray
from onnx_ir.passes.common import NameFixPass
from torch import Tensor

from .blocks import Blocks
from .errors import ExportError
from .quantise import quantise

BITS = {"int8": 8, "int4": 4}
"""Of a weight, at the precisions that round activations too."""

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""Of a weight, at the precisions that take half of float32's bytes."""


@dataclass(frozen=True)
class Prepared:
    """``model`` computes with the weights that are stored, and ``store`` puts them into a graph traced from it.

    With ``int8_cache`` keys and values are whole numbers of 8 bits, in ``model`` as in the graphs.
    Within ``as_computed()`` the model rounds whatever else the graphs' kernels round.
    """

    model: GPTModel
    int8_cache: bool
    store: Callable[[ir.Model], None]
    as_computed: Callable[[], AbstractContextManager[None]]


def prepare(model: GPTModel, precision: str, texts: Sequence[Sequence[int]], *, progress: bool) -> Prepared:
    """Round ``model`` to one of the runtime's ``PRECISIONS``; int8 and int4 look at what its layers make of ``texts``.

    Raises :class:`ExportError` for a weight that the type does not hold.
    """
    if precision == "fp32":
        return Prepared(model, False, lambda graph: None, contextlib.nullcontext)
    if precision in HALVES:
        store = partial(store_half, dtype=HALVES[precision])
        return Prepared(_to_half(model, precision), False, store, contextlib.nullcontext)
    quantised = quantise(model, BITS[precision], texts, progress=progress)
    table = {_digest(blocks.dense().numpy()): blocks for blocks in quantised.weights}
    store = partial(store_blocks, weights=table)
    return Prepared(quantised.model, True, store, quantised.as_computed)


def _to_half(model: GPTModel, precision: str) -> GPTModel:
    model, dtype = copy.deepcopy(model).eval(), HALVES[precision]
    for name, weight in model.named_parameters():
        if weight.ndim == 2 or precision == "bf16":  # whose graph for CUDA, all bfloat16, is held in float32
            weight.data = weight.data.to(dtype).float()
            if not weight.isfinite().all():
                largest = f"{torch.finfo(dtype).max:,.6g}"
                raise ExportError(f"{name} exceeds {largest}, the largest {precision}: take --precision fp32 or int8")
    return model


def store_half(graph: ir.Model, dtype: torch.dtype) -> None:
    """Keep the weights in 16 bits in the file; the graph casts them, and ONNX Runtime does so once, when it opens it.

    Its CPU kernels compute in float32. Of a table the rows are cast as they are read.
    """
    for name, value in list(graph.graph.initializers.items()):
        array = _array(value)
        if array is not None and array.dtype == np.float32:
            half = _add(graph, f"{name}.half", torch.from_numpy(array).to(dtype))
            for node, index in list(value.uses()):
                if node.op_type == "Gather":
                    rows = ir.node("Gather", [half, node.inputs[1]])
                    _replace(node, [rows, ir.node("Cast", rows.outputs, {"to": ir.DataType.FLOAT})])
                else:
                    cast = ir.node("Cast", [half], {"to": ir.DataType.FLOAT})
                    graph.graph.insert_before(graph.graph[0], cast)
                    node.replace_input_with(index, cast.outputs[0])
            del graph.graph.initializers[name]
    NameFixPass()(graph)  # a loop's body names its new values as the graph around it does


def store_blocks(graph: ir.Model, weights: dict[bytes, Blocks]) -> None:
    """Replace what reads one of these weights, found by the digest of its float32 bytes, by what reads its integers."""
    for name, value in list(graph.graph.initializers.items()):
        array = _array(value)
        blocks = None if array is None else weights.get(_digest(array))
        if blocks is not None:
            integers = _add(graph, f"{name}.integers", blocks.packed().numpy())
            scales = _add(graph, f"{name}.scales", blocks.scales[..., 0].numpy())
            for node, _ in list(value.uses()):
                make = _gather if node.op_type == "Gather" else _multiply
                _replace(node, make(node, blocks, integers, scales))
            del graph.graph.initializers[name]
    graph.graph.opset_imports.setdefault("com.microsoft", 1)
    NameFixPass()(graph)


def _multiply(node: ir.Node, blocks: Blocks, integers: ir.Value, scales: ir.Value) -> list[ir.Node]:
    """``Gemm`` -> ``MatMulNBits``, whose accuracy level 4 rounds the inputs to 8 bits block by block."""
    assert node.op_type == "Gemm"
    bias = [None, None, node.inputs[2]] if len(node.inputs) == 3 else []
    n_rows, _, size = blocks.integers.shape
    attributes = {"K": blocks.width, "N": n_rows, "bits": blocks.bits, "block_size": size, "accuracy_level": 4}
    inputs = [node.inputs[0], integers, scales, *bias]
    return [ir.node("MatMulNBits", inputs, attributes, domain="com.microsoft", version=1)]


def _gather(node: ir.Node, blocks: Blocks, integers: ir.Value, scales: ir.Value) -> list[ir.Node]:
    """The rows of a table of 8 bits, by standard operators: (B, S) -> (B, S, D)."""
    assert blocks.bits == 8
    ops = ir.tape.Tape()
    rows = ops.op("Cast", [ops.op("Gather", [integers, node.inputs[1]])], {"to": ir.DataType.FLOAT})
    rows = ops.op(
        "Sub", [rows, ops.op("Constant", [], {"value": ir.tensor(np.float32(128))})]
    )  # (B, S, n_blocks, size)
    factors = ops.op("Gather", [scales, node.inputs[1]])  # (B, S, n)
    factors = ops.op("Unsqueeze", [factors, ops.op("Constant", [], {"value": ir.tensor([-1])})])
    shape = ops.op("Constant", [], {"value": ir.tensor([0, 0, -1])})
    flat = ops.op("Reshape", [ops.op("Mul", [rows, factors]), shape])
    if blocks.integers[0].numel() > blocks.width:
        ends = [ops.op("Constant", [], {"value": ir.tensor([place])}) for place in (0, blocks.width, 2)]
        ops.op("Slice", [flat, *ends])
    return list(ops.nodes)


def _array(value: ir.Value) -> NDArray[np.float32] | None:
    """The matrices of a graph; all else stays float32."""
    tensor = value.const_value
    return None if tensor is None or len(tensor.shape) != 2 else tensor.numpy()


def _add(graph: ir.Model, name: str, array: NDArray[Any] | Tensor) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.graph.register_initializer(value)
    return value


def _replace(node: ir.Node, nodes: list[ir.Node]) -> None:
    """Put ``nodes`` in the place of ``node``; the last one's output is its output."""
    assert node.graph is not None
    node.append(nodes)
    node.outputs[0].replace_all_uses_with(nodes[-1].outputs[0])
    node.graph.remove(node, safe=True)


def _digest(array: NDArray[Any]) -> bytes:
    return hashlib.sha256(array.tobytes()).digest()
