"""``generate.onnx``: the book's greedy loop as one graph of standard operators.

One step, from token ids to the next id, is a PyTorch module and traced like the other graphs. Two ``Loop`` operators go
around it. The inner one repeats the step, cache in hand, until the context is full. The outer one begins anew with
the last ``context_length`` tokens and an empty cache, as often as it takes: once, unless the text outgrows the context,
and then for each token, as the book does. In the shapes below B is the batch and W the number of tokens read so far.
"""

import numpy as np
import onnx_ir as ir
import torch
from gptedge_models import GPTConfig, GPTModel
from onnx_ir.passes.common import NameFixPass
from torch import Tensor

from .graphs import Growing
from .operators import Ops
from .trace import export

INT64, BOOL = ir.DataType.INT64, ir.DataType.BOOL
END = np.iinfo(np.int64).max


class Step(Growing):
    """Read ids (B, S) behind a past of P: the next id of each row, and all that the following step needs."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        ended: Tensor,
        eos_token_id: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Mask (B, P+S), ended (B,) -> go on (), next ids (B, 1), mask (B, P+S+1), ended (B,), next ids (B,), cache."""
        batch_size = input_ids.shape[0]
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, past[0][0].shape[2] :]  # (B, S)
        x, present = self.read(input_ids, attention_mask, position_ids, past)
        last = x.view(batch_size, -1, self.config.emb_dim)[:, -1]  # (B, D)
        chosen = self.logits(last, (batch_size, 1))[:, 0].argmax(-1)  # (B,)
        next_ids = torch.where(ended, eos_token_id, chosen)
        next_mask = torch.cat((attention_mask, (~ended).long()[:, None]), dim=1)  # an ended row grows no longer
        ended = ended | (next_ids == eos_token_id)
        return (~ended).any(), next_ids[:, None], next_mask, ended, next_ids, present


def trace_step(model: GPTModel, opset: int, int8_cache: bool = False) -> ir.Model:
    """Export :class:`Step`; outputs in the order that ``Loop`` wants: go on, carried values, what is collected."""
    batch, new, past = 2, 3, 5
    sample = {
        "new_ids": (torch.zeros(batch, new, dtype=torch.int64), {0: "batch_size", 1: "new_length"}),
        "mask": (torch.ones(batch, past + new, dtype=torch.int64), {0: "batch_size", 1: "length"}),
        "ended": (torch.zeros(batch, dtype=torch.bool), {0: "batch_size"}),
        "eos_token_id": (torch.tensor(-1), dict[int, str]()),
    }
    cache = torch.zeros(batch, model.config.n_heads, past, model.config.head_dim)
    caches = {"past": (cache, {0: "batch_size", 2: "past_length"})}
    outputs = ["go_on", "next_new_ids", "next_mask", "next_ended", "next_ids"]
    step = export(Step(model, int8_cache), sample, caches, outputs, opset)
    step.graph.outputs.append(step.graph.outputs.pop(4))
    return step


def generate_graph(step: ir.Model, config: GPTConfig) -> ir.Model:
    """Put the loops around a traced step, whose weights become those of the whole graph."""
    ids = [ir.val(name, INT64, ["batch_size", "sequence_length"]) for name in ("input_ids", "attention_mask")]
    max_new_tokens, eos_token_id = ir.val("max_new_tokens", INT64, []), ir.val("eos_token_id", INT64, [])
    body = step.graph
    initializers = list(body.initializers.values())
    body.initializers.clear()
    ir.convenience.replace_all_uses_with(body.inputs.pop(3), eos_token_id)
    body.inputs[:0] = _counters("step")

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
    model = ir.Model(graph, ir_version=step.ir_version, producer_name=step.producer_name)
    NameFixPass()(model)
    return model


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
