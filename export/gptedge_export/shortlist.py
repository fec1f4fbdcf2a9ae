"""``decode.onnx`` with a large output head of 8 bits: it reads 4 bits of each token, and 8 bits of the best ones.

The head has a row of weights for each token of the vocabulary, a third of all that a step of GPT-2 124M reads. Half of
its bytes tell which tokens come into question; their logits are computed again by the weights of 8 bits, which then
stand in the file and are no longer read as a whole.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from .blocks import Blocks
from .operators import Ops

ROUGH_BITS = 4
"""Of the weights by which all tokens are looked at."""

N_BEST = 32
"""How many tokens have logits of 8 bits: the best by 4 bits."""

GROUP_SIZES = range(8, 33)
"""Of the groups of tokens in which the best are looked for; the larger the better up to the root of V / ``N_BEST``."""


def look_twice(model: ir.Model, rough: Blocks) -> None:
    """Let the head, the last node with integers, compute the logits of all tokens by ``rough``, the best by its own.

    The best have the same bits in any company, since each row is multiplied by itself. The others need not have them,
    and are lowered to the least of the best, so that none is chosen. Company can turn a choice only where it falls on
    the last of the best, which by ``rough`` is all but the same as the next.
    """
    *_, head = (node for node in model.graph.all_nodes() if node.op_type == "MatMulNBits")
    graph: Any = head.graph  # the model's, or the body of a Scan
    given, integers, scales = head.inputs[:3]  # (..., D), (V, n_blocks, block_size), (V, n_blocks)
    weights = []
    for part, tensor in (("integers", rough.packed()), ("scales", rough.scales[..., 0].contiguous())):
        name = f"{head.name}.rough_{part}"
        weights.append(ir.val(name, const_value=ir.tensor(tensor, name=name)))
        graph.register_initializer(weights[-1])
    width, ops = rough.width, Ops()
    attributes = {"K": width, "N": len(rough.integers), "bits": ROUGH_BITS, "block_size": rough.integers.shape[2]}
    attributes["accuracy_level"] = 4
    logits = ops.contrib("MatMulNBits", given, *weights, **attributes)  # (..., V)
    old: Any = head.outputs[0]
    outer = [0] * (1 if old.shape is None else len(old.shape) - 1)  # axes before the last, which stay as they are
    best = _best(ops, logits, outer, len(rough.integers))  # (..., k)
    rows = ops.DequantizeLinear(ops.Gather(integers, best), np.float32(1), np.uint8(128))  # (..., k, n_blocks, size)
    rows = ops.Mul(rows, ops.Unsqueeze(ops.Gather(scales, best), [-1]))
    filling = -width % head.attributes["block_size"].as_int()
    rows = ops.Reshape(rows, [*outer, N_BEST, width + filling])  # (..., k, K')
    if filling:
        rows = ops.Slice(rows, [0], [width], [-1])  # (..., k, D)
    exact = ops.Squeeze(ops.MatMul(rows, ops.Unsqueeze(given, [-1])), [-1])  # (..., k)
    others = ops.Min(logits, ops.ReduceMin(exact, [-1]))  # (..., V), of which none is to be chosen
    new = ops.ScatterElements(others, best, exact, axis=-1)  # (..., V)
    head.append(ops.nodes)
    if old.is_graph_output():
        new.name, new.dtype, new.shape = old.name, old.dtype, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(head, safe=True)
    NameFixPass()(model)


def _best(ops: Ops, logits: ir.Value, outer: list[int], count: int) -> ir.Value:
    """Where the largest of logits (..., V) are, (..., k).

    ``TopK``, which looks at one number after the other, is for few: those of the k groups with the largest maxima, in
    which they all lie. A vocabulary that has no such groups is looked through as it is.
    """
    size = max((size for size in GROUP_SIZES if count % size == 0), default=None)
    if size is None:
        return _largest(ops, logits)
    maxima = ops.ReduceMax(ops.Reshape(logits, [*outer, count // size, size]), [-1], keepdims=0)  # (..., V / g)
    groups = ops.Unsqueeze(_largest(ops, maxima), [-1])  # (..., k, 1)
    ids = ops.Reshape(ops.Add(ops.Mul(groups, size), np.arange(size)), [*outer, N_BEST * size])  # (..., k * g)
    places = _largest(ops, ops.GatherElements(logits, ids, axis=-1))  # (..., k)
    best: ir.Value = ops.GatherElements(ids, places, axis=-1)
    return best


def _largest(ops: Ops, values: ir.Value) -> ir.Value:
    count = ops.Constant(value=ir.tensor(np.array([N_BEST])))
    places: ir.Value = ops.op_multi_out("TopK", [values, count], {"sorted": 0}, num_outputs=2)[1]
    return places
