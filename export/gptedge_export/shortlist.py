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

N_BEST = 64
"""How many tokens have logits of 8 bits: the best by 4 bits."""


def look_twice(model: ir.Model, rough: Blocks) -> None:
    """Let the head, the last node with integers, compute the logits of all tokens by ``rough``, the best by its own.

    The best have the same bits in any company, since each row is multiplied by itself; the others need not have them.
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
    logits = ops.op("MatMulNBits", [given, *weights], attributes, domain="com.microsoft", version=1)  # (..., V)
    count = ops.Constant(value=ir.tensor(np.array([N_BEST])))
    _, best = ops.op_multi_out("TopK", [logits, count], {"sorted": 0}, num_outputs=2)  # (..., k)
    rows = ops.DequantizeLinear(ops.Gather(integers, best), np.float32(1), np.uint8(128))  # (..., k, n_blocks, size)
    rows = ops.Mul(rows, ops.Unsqueeze(ops.Gather(scales, best), [-1]))
    filling = -width % head.attributes["block_size"].as_int()
    rows = ops.Reshape(rows, [-1, N_BEST, width + filling])  # (R, k, K')
    if filling:
        rows = ops.Slice(rows, [0], [width], [2])  # (R, k, D)
    exact = ops.MatMul(rows, ops.Reshape(given, [-1, width, 1]))  # (R, k, 1)
    new = ops.ScatterElements(logits, best, ops.Reshape(exact, ops.Shape(best)), axis=-1)  # (..., V)
    old: Any = head.outputs[0]
    head.append(ops.nodes)
    if old.is_graph_output():
        new.name, new.dtype, new.shape = old.name, old.dtype, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(head, safe=True)
    NameFixPass()(model)
