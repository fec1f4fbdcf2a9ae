"""The reshapes between the integer kernels of ``decode.onnx``, which take time and change nothing."""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


def drop_reshapes(model: ir.Model, width: int) -> None:
    """Keep (B, S, D) from end to end, where ``width`` is D.

    ``MatMulNBits`` takes it as well as (B*S, D), so that no reshape is needed before the last rows are taken. Heads
    that are filled up to a multiple of 8 need their reshapes: then all stay.
    """
    layers = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    sources = [before_reshapes(node.inputs[0]) for node in layers]
    if any(producer is None or producer.op_type != "MatMulNBits" for producer in map(ir.Value.producer, sources)):
        return
    first = next(node for node in model.graph if node.op_type == "LayerNormalization")
    flat = first.inputs[0]
    assert flat is not None
    flat.replace_all_uses_with(before_reshapes(flat))
    for node, source in zip(layers, sources, strict=True):
        node.replace_input_with(0, source)
        for reshape, _ in list(node.outputs[0].uses()):
            assert reshape.op_type == "Reshape"
            reshape.outputs[0].replace_all_uses_with(node.outputs[0])
    last = next(node for node in model.graph if node.op_type == "GatherND")
    shape = ir.node("Constant", [], {"value": ir.tensor([-1, width])})
    rows = ir.node("Reshape", [last.inputs[0], shape.outputs[0]])
    model.graph.insert_before(last, [shape, rows])
    last.replace_input_with(0, rows.outputs[0])
    RemoveUnusedNodesPass()(model)


def before_reshapes(value: ir.Value | None) -> ir.Value:
    """What a value is but for reshapes."""
    assert value is not None
    producer = value.producer()
    return before_reshapes(producer.inputs[0]) if producer is not None and producer.op_type == "Reshape" else value
