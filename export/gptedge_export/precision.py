"""The precisions of the weights: what each makes of a model, and of its graphs."""

import contextlib
import copy
import hashlib
import math
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
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass
from torch import Tensor

from .blocks import LEAST, Blocks
from .errors import ExportError
from .operators import Ops
from .quantise import quantise

BITS = {"int8": 8, "int4": 4}
"""Of a weight, at the precisions that round activations too."""

Add = Callable[[str, Tensor], ir.Value]
Multiply = Callable[[ir.Node, Blocks, Add], list[ir.Node]]

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""Of a weight, at the precisions that take half of float32's bytes."""


@dataclass(frozen=True)
class Prepared:
    """``model`` computes with the weights that are stored, and ``store`` puts them into a graph traced from it.

    With ``int8_cache`` keys and values are whole numbers of 8 bits, in ``model`` as in the graphs.
    Within ``as_computed()`` the model rounds whatever else the graphs' kernels round; ``as_computed(n, m)`` has the
    first n tokens read by ``prefill.onnx`` with an ``activation_max`` of m. ``store_prefill`` puts the weights into
    that, where this precision has one. ``rough_head`` is what ``decode.onnx`` looks at before ``out_head``, if it does.
    """

    model: GPTModel
    int8_cache: bool
    store: Callable[[ir.Model], None]
    as_computed: Callable[..., AbstractContextManager[None]]
    store_prefill: Callable[[ir.Model], None] | None = None
    rough_head: Blocks | None = None


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
    store = partial(store_blocks, weights=table, multiply=_multiply)
    by_row = partial(store_rows, weights=table)
    return Prepared(quantised.model, True, store, quantised.as_computed, by_row, quantised.rough_head)


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
            half = _add(graph, name, "half", torch.from_numpy(array).to(dtype))
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


def store_blocks(graph: ir.Model, weights: dict[bytes, Blocks], multiply: Multiply) -> None:
    """Replace what reads one of these weights, found by the digest of its float32 bytes, by what reads its integers."""
    for name, value in list(graph.graph.initializers.items()):
        array = _array(value)
        blocks = None if array is None else weights.get(_digest(array))
        if blocks is not None:
            for node, _ in list(value.uses()):
                make = _gather if node.op_type == "Gather" else multiply
                _replace(node, make(node, blocks, partial(_add, graph, name)))
            del graph.graph.initializers[name]
    graph.graph.opset_imports.setdefault("com.microsoft", 1)
    NameFixPass()(graph)


def store_rows(graph: ir.Model, weights: dict[bytes, Blocks]) -> None:
    """The same for ``prefill.onnx``, with an input ``activation_max`` and an output ``is_exact``.

    Inputs of layers become whole numbers up to ``activation_max``, and up to 63 on a processor that adds two products
    in 16 bits, as x86 does without VNNI. Such a one is found by an example, whose sums are not those that they should
    be: then ``is_exact`` is 0.
    """
    activation_max = ir.val("activation_max", ir.DataType.FLOAT, [])
    graph.graph.inputs.append(activation_max)
    ops = Ops()
    sums = ops.MatMulInteger(np.full((8, 64), 255, np.uint8), np.full((64, 16), 127, np.int8))  # (8, 16)
    is_right = ops.Cast(ops.Equal(sums, np.int32(64 * 255 * 127)), to=ir.DataType.INT32)
    is_exact = ops.ReduceMin(is_right, keepdims=0)
    is_exact.name, is_exact.dtype, is_exact.shape = "is_exact", ir.DataType.INT32, ir.Shape([])
    bound = ops.Where(ops.Cast(is_exact, to=ir.DataType.BOOL), activation_max, ops.Min(activation_max, np.float32(63)))
    graph.graph.insert_before(graph.graph[0], list(ops.nodes))
    graph.graph.outputs.append(is_exact)
    store_blocks(graph, weights, partial(_multiply_rows, activation_max=bound))
    for node in graph.graph:  # what is turned there and back is not turned
        if (once := _before_transpose(node.outputs[0])) and (origin := _before_transpose(once)):
            node.outputs[0].replace_all_uses_with(origin)
    RemoveUnusedNodesPass()(graph)
    for node in list(graph.graph):
        unread = [value for value in node.outputs if not value.uses() and not value.is_graph_output()]
        node.append([ir.node("Shape", [value]) for value in unread])  # else onnxruntime keeps them to a run's end


def _multiply(node: ir.Node, blocks: Blocks, add: Add) -> list[ir.Node]:
    """``Gemm`` -> ``MatMulNBits``, whose accuracy level 4 rounds the inputs to 8 bits block by block."""
    assert node.op_type == "Gemm"
    bias = [None, None, node.inputs[2]] if len(node.inputs) == 3 else []
    n_rows, _, size = blocks.integers.shape
    attributes = {"K": blocks.width, "N": n_rows, "bits": blocks.bits, "block_size": size, "accuracy_level": 4}
    inputs = [node.inputs[0], add("integers", blocks.packed()), add("scales", blocks.scales[..., 0]), *bias]
    return [ir.node("MatMulNBits", inputs, attributes, domain="com.microsoft", version=1)]


def _multiply_rows(node: ir.Node, blocks: Blocks, add: Add, activation_max: ir.Value) -> list[ir.Node]:
    """``Gemm`` -> ``MatMulIntegerToFloat``, before which each row of the inputs (S, K) is rounded by itself.

    The weights stand on the left, as they are stored if they have 8 bits: ONNX Runtime multiplies unsigned by signed
    integers twice as fast as other ones, and so the inputs are the signed ones, on the right. Both inputs and outputs
    are columns there: what comes of a ``Transpose`` is taken before it, and what goes into one is given without any.
    """
    assert node.op_type == "Gemm"
    ops, x = Ops(), node.inputs[0]
    turned = _before_transpose(x)
    if turned is None:
        largest = ops.ReduceMax(ops.Abs(x), [-1])  # (S, 1)
    else:
        x, n_groups = turned, math.gcd(blocks.width, 64)  # (K, S); groups, since a maximum of whole columns is slow
        groups = ops.Reshape(ops.Abs(x), [n_groups, blocks.width // n_groups, -1])
        largest = ops.ReduceMax(ops.ReduceMax(groups, [1], keepdims=0), [0])  # (1, S)
    steps = ops.Div(ops.Max(largest, np.float32(LEAST)), activation_max)  # (S, 1) or (1, S)
    one, zero = np.float32(1), np.int8(0)
    columns = ops.QuantizeLinear(ops.Div(x, steps), one, zero)
    if turned is None:
        columns = ops.Transpose(columns, perm=[1, 0])  # (K, S)
    width = blocks.integers[0].numel()
    if width > blocks.width:
        columns = ops.Pad(columns, [0, 0, width - blocks.width, 0])  # (K', S)
    assert blocks.steps is not None
    row_steps = add("steps", blocks.steps)  # (N, 1)
    if blocks.bits == 8:
        rows = add("rows", blocks.packed().flatten(1))  # (N, K')
    else:
        rows = _unpack(ops, blocks, add("integers", blocks.packed()), add("scales", blocks.scales[..., 0]), row_steps)
        pairs = ops.Reshape(columns, [width // 2, 2, -1])
        columns = ops.Reshape(ops.Transpose(pairs, perm=[1, 0, 2]), [width, -1])
    inputs = [rows, columns, one, ops.Reshape(steps, [-1]), np.uint8(128), zero]
    out = ops.Mul(ops.contrib("MatMulIntegerToFloat", *inputs), row_steps)  # (N, S)
    if len(node.inputs) == 3:
        out = ops.Add(out, ops.Unsqueeze(node.inputs[2], [1]))
    ops.Transpose(out, perm=[1, 0])  # (S, N)
    return list(ops.nodes)


def _unpack(ops: Ops, blocks: Blocks, integers: ir.Value, scales: ir.Value, steps: ir.Value) -> ir.Value:
    """Weights of 4 bits as multiples of their rows' steps, uint8 (N, K'): all even columns, then all odd ones.

    A byte holds an even and an odd one, which are masked and left where they stand: the odd ones are 16 times as large.
    """
    multiples = ops.Unsqueeze(ops.Round(ops.Div(scales, steps)), [-1])  # (N, n_blocks, 1)
    shifted = ops.Cast(ops.Add(multiples, np.float32(128)), to=ir.DataType.UINT8)
    one, zero, halves = np.float32(1), np.uint8(128), list[ir.Value]()
    for mask, scale, middle in ((0x0F, 1, 8), (0xF0, 1 / 16, 8 * 16)):
        masked = ops.BitwiseAnd(integers, np.uint8(mask))  # (N, n_blocks, block_size / 2)
        inputs = [masked, np.float32(scale), np.uint8(middle), shifted, one, zero, one, zero]
        halves.append(ops.Reshape(ops.contrib("QLinearMul", *inputs), [len(blocks.integers), -1]))
    rows: ir.Value = ops.Concat(*halves, axis=1)
    return rows


def _before_transpose(x: ir.Value | None) -> ir.Value | None:
    """What ``x`` is the transposed matrix of, where it is one."""
    node = x.producer() if x else None
    if node is None or node.op_type != "Transpose" or [*node.attributes["perm"].as_ints()] != [1, 0]:
        return None
    return node.inputs[0]


def _gather(node: ir.Node, blocks: Blocks, add: Add) -> list[ir.Node]:
    """The rows of a table of 8 bits, by standard operators: (B, S) -> (B, S, D)."""
    assert blocks.bits == 8
    ops, ids = Ops(), node.inputs[1]
    integers = ops.Cast(ops.Gather(add("integers", blocks.packed()), ids), to=ir.DataType.FLOAT)
    factors = ops.Unsqueeze(ops.Gather(add("scales", blocks.scales[..., 0]), ids), [-1])  # (B, S, n_blocks, 1)
    flat = ops.Reshape(ops.Mul(ops.Sub(integers, np.float32(128)), factors), [0, 0, -1])
    if blocks.integers[0].numel() > blocks.width:
        ops.Slice(flat, [0], [blocks.width], [2])
    return list(ops.nodes)


def _array(value: ir.Value) -> NDArray[np.float32] | None:
    """The matrices of a graph; all else stays float32."""
    tensor = value.const_value
    return None if tensor is None or len(tensor.shape) != 2 else tensor.numpy()


def _add(graph: ir.Model, name: str, part: str, tensor: Tensor) -> ir.Value:
    """An initializer of the graph, one for all that ask for the same."""
    name = f"{name}.{part}"
    if name not in graph.graph.initializers:
        graph.graph.register_initializer(ir.val(name, const_value=ir.tensor(tensor.contiguous(), name=name)))
    return graph.graph.initializers[name]


def _replace(node: ir.Node, nodes: list[ir.Node]) -> None:
    """Put ``nodes`` in the place of ``node``; the last one's output is its output."""
    assert node.graph is not None
    node.append(nodes)
    node.outputs[0].replace_all_uses_with(nodes[-1].outputs[0])
    node.graph.remove(node, safe=True)


def _digest(array: NDArray[Any]) -> bytes:
    return hashlib.sha256(b"%r" % (array.shape,) + array.tobytes()).digest()
