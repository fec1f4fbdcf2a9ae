"""The reshapes between the integer kernels of ``decode.onnx``, which take time and change nothing."""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


def drop_reshapes(model: ir.Model) -> None:
    """Keep (B, S, D) from end to end: ``MatMulNBits`` takes it as well as (B*S, D).

    Heads that are filled up to a multiple of 8 need their reshapes: then all stay.
    """
    nodes = [*model.graph]
    layers = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    sources = [before_reshapes(node.inputs[0]) for node in layers]
    if any(producer is None or producer.op_type != "MatMulNBits" for producer in map(ir.Value.producer, sources)):
        return
    first = next(index for index, node in enumerate(nodes) if node.op_type == "LayerNormalization")
    flat = [nodes[first].inputs[0], *(node.outputs[0] for node in nodes[first:] if node.op_type == "Reshape")]
    for value in flat:
        assert value is not None
        source = before_reshapes(value)
        if value.is_graph_output():
            source.name, source.dtype, source.shape = value.name, value.dtype, value.shape
        value.replace_all_uses_with(source, replace_graph_outputs=True)
    RemoveUnusedNodesPass()(model)


def before_reshapes(value: ir.Value | None) -> ir.Value:
    """What a value is but for reshapes."""
    assert value is not None
    producer = value.producer()
    return before_reshapes(producer.inputs[0]) if producer is not None and producer.op_type == "Reshape" else value
