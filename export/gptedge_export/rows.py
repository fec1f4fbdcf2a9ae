"""``decode.onnx`` at int4: short sequences row by row, so that each row has the bits that it has alone.

ONNX Runtime's kernel for 4 bits adds in one order for a single row and in another for several. What lies between two
attentions looks at each row by itself, so it becomes the body of a ``Scan``: it gets one row at a time where sequences
are short, as in decode steps, and all rows at once where they are prompts. From the second row on a step finds the
layer's weights in the processor's cache, which is what makes drafts and batches worth their while.

The output head, behind which nothing is rounded, gets all rows of a single sequence at once, in about half the time:
its logits may then differ in their last bits, and whoever reads drafts looks at that.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from .reshapes import before_reshapes

BY_ROW_TOKENS = 16
"""The longest sequence that is computed row by row; the runtime's drafts are no longer."""


def compute_by_row(model: ir.Model, width: int) -> None:
    """Put all that works on rows (B*S, ``width``), from one attention to the next, into a ``Scan``."""
    graph = model.graph
    ops = ir.tape.Tape()
    shape, head_shape = _groupings(ops, graph.inputs[0], width)
    graph.insert_before(graph[0], list(ops.nodes))
    segment: list[ir.Node] = []
    grouped: dict[ir.Value, ir.Value] = {}
    for node in [*graph]:
        if node.op_type in ("GroupQueryAttention", "GatherND"):
            if segment:  # else the second of two that pick rows
                _scan(segment, shape, grouped)
                segment = []
            reshape = node.inputs[0].producer()
            if reshape.op_type == "Reshape":  # of several the last says all
                reshape.replace_input_with(0, before_reshapes(node.inputs[0]))
        elif node.op_type in ("MatMulNBits", "LayerNormalization") or _goes_on(segment, node):
            segment.append(node)
    *layer, head = segment
    _scan(layer, shape, grouped)
    _scan([head], head_shape, {})
    RemoveUnusedNodesPass()(model)
    NameFixPass()(model)


def _groupings(ops: ir.tape.Tape, input_ids: ir.Value, width: int) -> tuple[ir.Value, ir.Value]:
    """The shapes (n, g, ``width``) of n groups of g rows, for token ids (B, S): of the layers and of the head."""

    def constant(*numbers: int) -> ir.Value:
        return ops.op("Constant", [], {"value": ir.tensor(np.array(numbers))})

    one_by_one, at_once = constant(-1, 1, width), constant(1, -1, width)
    is_short = ops.op("LessOrEqual", [ops.op("Shape", [input_ids], {"start": 1}), constant(BY_ROW_TOKENS)])  # (1,)
    shape = ops.op("Where", [is_short, one_by_one, at_once])
    is_single = ops.op("Equal", [ops.op("Shape", [input_ids], {"end": 1}), constant(1)])  # (1,)
    return shape, ops.op("Where", [is_single, at_once, shape])


def _bring_in_weights(body: ir.Graph) -> None:
    """Give the body constants of its own: ONNX Runtime packs the weights of ``MatMulNBits`` nowhere else."""
    for node in body:
        for index, value in enumerate(node.inputs):
            if node.op_type == "MatMulNBits" and value is not None and value.is_initializer():
                name = f"{value.name}.rows"
                if name not in body.initializers:  # layers whose biases are equal share one
                    body.register_initializer(ir.val(name, const_value=value.const_value))
                node.replace_input_with(index, body.initializers[name])


def _goes_on(segment: list[ir.Node], node: ir.Node) -> bool:
    """Whether it works on rows, too: a sum or GELU, which is several operators below opset 20."""
    return node.op_type != "Reshape" and any(value.producer() in segment for value in node.inputs if value is not None)


def _is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    return value.is_initializer() or (producer is not None and producer.op_type == "Constant")


def _scan(segment: list[ir.Node], shape: ir.Value, grouped: dict[ir.Value, ir.Value]) -> None:
    """Make these nodes the body of a ``Scan``; ``grouped`` has what earlier ones gave, (n, g, D), by form (B*S, D)."""
    graph = segment[0].graph
    assert graph is not None
    made = [value for node in segment for value in node.outputs]
    read = dict.fromkeys(value for node in segment for value in node.inputs if value is not None)
    given = [value for value in read if value not in made and not _is_constant(value)]
    kept = [value for value in made if any(user not in segment for user, _ in value.uses())]
    users = [[(user, index) for user, index in value.uses() if user not in segment] for value in kept]

    before, after = ir.tape.Tape(), ir.tape.Tape()
    inputs = [grouped.get(value) or before.op("Reshape", [before_reshapes(value), shape]) for value in given]
    rows = [ir.val(f"{value.name}.rows", ir.DataType.FLOAT, [None, None]) for value in given]  # (g, D)
    for value, row in zip(given, rows, strict=True):
        for user, index in list(value.uses()):
            if user in segment:
                user.replace_input_with(index, row)
    graph.insert_before(segment[-1], list(before.nodes))
    graph.remove(segment)
    for value in kept:
        value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape([None, None])
    body = ir.Graph(rows, kept, nodes=segment, name=f"{segment[-1].name}.rows")
    _bring_in_weights(body)
    attributes: dict[str, Any] = {"body": body, "num_scan_inputs": len(inputs)}
    groups = after.op_multi_out("Scan", inputs, attributes, num_outputs=len(kept))  # (n, g, ...)
    for group, outside in zip(groups, users, strict=True):
        flat = after.op("Flatten", [group], {"axis": 2})  # (B*S, ...)
        grouped[flat] = group
        for user, index in outside:
            user.replace_input_with(index, group if user.op_type == "Reshape" else flat)
    graph.insert_after(before.nodes[-1], list(after.nodes))
