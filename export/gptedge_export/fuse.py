"""What takes time between the integer kernels of ``decode.onnx``: fewer, larger operators for the same values."""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


def fuse(model: ir.Model, width: int) -> None:
    """Add and normalise in one operator, take ONNX Runtime's own GELU, and keep (B, S, D) from end to end.

    ``width`` is D. Each operator costs a token some microseconds, and an int8 or int4 step has few of them
    (docs/performance.md).
    """
    _keep_three_axes(model.graph, width)
    for node in list(model.graph):
        if node.op_type == "LayerNormalization":
            _join_sum(node)
        elif node.op_type == "Gelu" and node.attributes.get_string("approximate") == "tanh":
            _put(node, ir.node("FastGelu", node.inputs, domain="com.microsoft", version=1))
    RemoveUnusedNodesPass()(model)


def _keep_three_axes(graph: ir.Graph, width: int) -> None:
    """``MatMulNBits`` takes (B, S, D) as well as (B*S, D), so that no reshape is needed before the last rows are taken.

    Heads that are filled up to a multiple of 8 need their reshapes: then all stay.
    """
    layers = [node for node in graph if node.op_type == "GroupQueryAttention"]
    sources = [_before_reshapes(node.inputs[0]) for node in layers]
    if any(producer is None or producer.op_type != "MatMulNBits" for producer in map(ir.Value.producer, sources)):
        return
    first = next(node for node in graph if node.op_type == "LayerNormalization")
    flat = first.inputs[0]
    assert flat is not None
    flat.replace_all_uses_with(_before_reshapes(flat))
    for node, source in zip(layers, sources, strict=True):
        node.replace_input_with(0, source)
        for reshape, _ in list(node.outputs[0].uses()):
            assert reshape.op_type == "Reshape"
            reshape.outputs[0].replace_all_uses_with(node.outputs[0])
    last = next(node for node in graph if node.op_type == "GatherND")
    shape = ir.node("Constant", [], {"value": ir.tensor([-1, width])})
    rows = ir.node("Reshape", [last.inputs[0], shape.outputs[0]])
    graph.insert_before(last, [shape, rows])
    last.replace_input_with(0, rows.outputs[0])


def _join_sum(node: ir.Node) -> None:
    """``Add`` and ``LayerNormalization`` -> ``SkipLayerNormalization``, whose fourth output is the sum."""
    total = node.inputs[0]
    assert total is not None
    add = total.producer()
    if add is None or add.op_type != "Add":
        return
    inputs = [*add.inputs, *node.inputs[1:]]
    attributes = {"epsilon": node.attributes.get_float("epsilon")}
    joined = ir.node("SkipLayerNormalization", inputs, attributes, domain="com.microsoft", version=1, num_outputs=4)
    joined.outputs[1].name = joined.outputs[2].name = ""
    _put(node, joined)
    total.replace_all_uses_with(joined.outputs[3])


def _put(node: ir.Node, new: ir.Node) -> None:
    """Put ``new`` in the place of ``node``; its first output is what ``node`` gave."""
    assert node.graph is not None
    node.graph.insert_before(node, new)
    node.outputs[0].replace_all_uses_with(new.outputs[0])
    node.graph.remove(node, safe=True)


def _before_reshapes(value: ir.Value | None) -> ir.Value:
    assert value is not None
    producer = value.producer()
    return _before_reshapes(producer.inputs[0]) if producer is not None and producer.op_type == "Reshape" else value
