"""``generate.onnx``: the book's greedy loop as one graph of standard operators.

One step, from token ids to the next id, is ``model.onnx`` with a choice behind it. Two ``Loop`` operators go around it.
The inner one repeats the step, cache in hand, until the context is full. The outer one begins anew with the last
``context_length`` tokens and an empty cache, as often as it takes: once, unless the text outgrows the context, and
then for each token, as the book does. In the shapes below B is the batch, S the tokens of a step, P those in the cache,
D the width and W the number of tokens read so far.
"""

import numpy as np
import onnx_ir as ir
from gptedge_models import GPTConfig
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from .operators import Ops

INT64, BOOL = ir.DataType.INT64, ir.DataType.BOOL
END = np.iinfo(np.int64).max


def generate_graph(model: ir.Model, config: GPTConfig) -> ir.Model:
    """Put the loops around the traced ``model.onnx``, which becomes part of the whole graph, with its weights."""
    ids = [ir.val(name, INT64, ["batch_size", "sequence_length"]) for name in ("input_ids", "attention_mask")]
    max_new_tokens, eos_token_id = ir.val("max_new_tokens", INT64, []), ir.val("eos_token_id", INT64, [])
    body = model.graph
    initializers = list(body.initializers.values())
    body.initializers.clear()
    _make_step(body, eos_token_id, config)

    ops = Ops()
    batch_size = ops.Shape(ids[0], end=1)
    empty = ops.ConstantOfShape(ops.Concat(batch_size, [config.n_heads, 0, config.head_dim], axis=0))
    ended = ops.ConstantOfShape(batch_size, value=ir.tensor([False]))
    length = ops.Add(ops.Shape(ids[0], start=1), max_new_tokens)  # (1,)
    output_ids, *_ = ops.loop(max_new_tokens, _round(body, config.context_length, length, empty), [*ids, ended])
    output_ids.name, output_ids.dtype = "output_ids", INT64
    output_ids.shape = ir.Shape(["batch_size", "total_sequence_length"])

    inputs = [*ids, max_new_tokens, eos_token_id]
    graph = ir.Graph(
        inputs, [output_ids], nodes=ops.nodes, initializers=initializers, opset_imports=body.opset_imports, name="main"
    )
    whole = ir.Model(graph, ir_version=model.ir_version, producer_name=model.producer_name)
    RemoveUnusedNodesPass()(whole)
    NameFixPass()(whole)
    return whole


def fold_weights(graph: ir.Model) -> None:
    """Give each ``MatMulNBits`` in the body of a loop weights that ONNX Runtime makes constants of that body.

    It packs no others, and is up to ten times as slow on what it has not packed. What follows from constants alone it
    computes once, when it opens the graph: here a ``Reshape`` that changes nothing. Weights that lie in the body itself
    would do in Python, Node and C, but onnxruntime-web does not find them in the file beside the graph.
    """
    for body in list(graph.graph.subgraphs()):
        ops = Ops()
        for node in body:
            if node.op_type == "MatMulNBits":
                node.replace_input_with(1, ops.Reshape(node.inputs[1], [0, 0, -1]))
        if ops.nodes:
            body.insert_before(body[0], ops.nodes)
    NameFixPass()(graph)


def _make_step(graph: ir.Graph, eos_token_id: ir.Value, config: GPTConfig) -> None:
    """Let ``model.onnx`` count positions itself, show the head its last token alone, and choose.

    It becomes the body of the inner loop: ids (B, S), mask (B, P+S), ended rows (B,) and the cache go in; whether to go
    on, next ids (B, 1), mask (B, P+S+1), ended rows (B,), the cache, and next ids (B,) to be collected come out.
    """
    new_ids, mask, position_ids, *past = graph.inputs
    _, *present = graph.outputs
    *_, norm = (node for node in graph if node.op_type == "LayerNormalization")
    *_, head = (node for node in graph if node.op_type == "Gemm")
    ended = ir.val("ended", BOOL, ["batch_size"])
    new_ids.name, mask.name = "new_ids", "mask"
    for value in (*graph.inputs, *present):  # other lengths than those of the whole graph, and new ones at each step
        assert value.shape is not None
        value.shape = ir.Shape([f"step_{dim}" if "length" in str(dim) else dim for dim in value.shape])

    ops = Ops()
    positions = ops.Max(ops.Sub(ops.CumSum(mask, 1), 1), 0)  # (B, P+S)
    positions = ops.Slice(positions, ops.Shape(past[0], start=2, end=3), [END], [1])  # (B, S)
    ir.convenience.replace_all_uses_with(position_ids, positions)
    graph.insert_before(graph[0], ops.nodes)

    ops = Ops()
    rows = ops.Reshape(norm.inputs[0], ops.Concat(ops.Shape(new_ids, end=1), [-1, config.emb_dim], axis=0))  # (B, S, D)
    norm.replace_input_with(0, ops.Gather(rows, -1, axis=1))  # (B, D)
    graph.insert_before(norm, ops.nodes)

    ops = Ops()
    next_ids = ops.Where(ended, eos_token_id, ops.ArgMax(head.outputs[0], axis=-1, keepdims=0))  # (B,)
    more = ops.Unsqueeze(ops.Cast(ops.Not(ended), to=INT64), [1])  # an ended row grows no longer
    now_ended = ops.Or(ended, ops.Equal(next_ids, eos_token_id))
    go_on = ops.Cast(ops.ReduceMax(ops.Cast(ops.Not(now_ended), to=INT64), keepdims=0), to=BOOL)
    carried = [ops.Unsqueeze(next_ids, [1]), ops.Concat(mask, more, axis=1), now_ended, *present]
    graph.extend(ops.nodes)
    graph.inputs[:] = [*_counters("step"), new_ids, mask, ended, *past]
    graph.outputs[:] = [go_on, *carried, next_ids]


def _round(step: ir.Graph, context_length: int, length: ir.Value, empty: ir.Value) -> ir.Graph:
    """Body of the outer loop: read the last ``context_length`` tokens, then write until the context is full.

    Carried are all ids (B, W), the mask of at least the last ``context_length`` of them, and the ended rows (B,).
    """
    ops = Ops()
    ids, mask, ended = ir.val("ids", INT64), ir.val("window_mask", INT64), ir.val("ended_rows", BOOL)
    window, window_mask = (ops.Slice(x, [-context_length], [END], [1]) for x in (ids, mask))
    longest = ops.ReduceMax(ops.ReduceSum(window_mask, [1], keepdims=0), keepdims=0)  # ()
    room = ops.Sub(context_length + 1, longest)  # the last new token is not read any more
    missing = ops.Sub(length, ops.Shape(ids, start=1))  # (1,)
    carried = [window, window_mask, ended, *[empty] * (len(step.inputs) - 5)]
    _, new_mask, now_ended, *_, new_ids = ops.loop(ops.Squeeze(ops.Min(room, missing)), step, carried)
    all_ids = ops.Concat(ids, ops.Transpose(new_ids, perm=[1, 0]), axis=1)
    all_ended = ops.ReduceMin(ops.Cast(now_ended, to=INT64), keepdims=0)  # ()
    complete = ops.Squeeze(ops.Equal(ops.Shape(all_ids, start=1), length))
    go_on = ops.Not(ops.Or(ops.Cast(all_ended, to=BOOL), complete))
    inputs = [*_counters("round"), ids, mask, ended]
    return ir.Graph(inputs, [go_on, all_ids, new_mask, now_ended], nodes=ops.nodes, name="round")


def _counters(name: str) -> list[ir.Value]:
    """The two inputs that every body of a ``Loop`` begins with."""
    return [ir.val(f"{name}_number", INT64, []), ir.val(f"{name}_goes_on", BOOL, [])]
