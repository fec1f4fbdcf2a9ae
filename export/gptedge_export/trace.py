"""Modules to ONNX by ``torch.onnx.export``, with dynamic axes and nothing that tells of the machine."""

import contextlib
import gc
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from gptedge_models import GPTConfig, GPTModel
from torch import Tensor

from .cuda import DecodeOnCuda
from .graphs import IN_PLACE, Cached, Decode, Forward, Prefill, Stack, cache_names, cache_width

GRAPHS: dict[str, type[Stack]] = {
    "decode": Decode,
    "decode_cuda": DecodeOnCuda,
    "forward": Forward,
    "model": Cached,
    "prefill": Prefill,
}

Sample = dict[str, tuple[Tensor, dict[int, str]]]
"""Example inputs by name, each with the names of its varying axes."""


def _sample(name: str, config: GPTConfig) -> Sample:
    """Batch and sequence are at least 2, since the exporter takes an axis of length 1 for a fixed one.

    Each tensor is an object of its own, since it takes one object given twice for one input.
    """
    batch, new, past = 2, min(3, config.context_length), 5

    def ids(axis: str, length: int = new) -> tuple[Tensor, dict[int, str]]:
        return torch.zeros(batch, length, dtype=torch.int64), {0: "batch_size", 1: axis}

    if name == "forward":
        return {"input_ids": ids("sequence_length")}
    if name == "prefill":  # of one prompt
        return {"input_ids": (torch.zeros(1, new, dtype=torch.int64), {1: "sequence_length"})}
    if name == "model":
        return {
            "input_ids": ids("sequence_length"),
            "attention_mask": ids("total_sequence_length", past + new),
            "position_ids": ids("sequence_length"),
        }
    return {
        "input_ids": ids("sequence_length"),
        "position_ids": ids("sequence_length"),
        "seqlens_k": (torch.zeros(batch, dtype=torch.int32), {0: "batch_size"}),
        "total_sequence_length": (torch.tensor(past + new, dtype=torch.int32), {}),
        "logit_positions": ids("logit_count", 2),
    }


def trace(model: GPTModel, name: str, opset: int, int8_cache: bool = False) -> ir.Model:
    """Export one of ``GRAPHS`` with dynamic batch and sequence; its weights share the memory of ``model``.

    With a cache, ``past_key_values.*`` are the last inputs and ``present.*`` the last outputs. The graph carries no
    stack trace, no path and no shape of an intermediate value.
    """
    config, sample = model.config, _sample(name, model.config)
    input_names, outputs = [*sample], {"decode_cuda": ["logits", "best_ids"], "prefill": []}.get(name, ["logits"])
    past, past_axes = list[Any](), list[Any]()
    if name != "forward":
        dtype = torch.int8 if name in ("decode", "prefill") and int8_cache else model.tok_emb.weight.dtype
        n_rows, axes = (1, dict[int, str]()) if name == "prefill" else (2, {0: "batch_size"})
        cache = torch.zeros(n_rows, config.n_heads, 5, cache_width(name, config), dtype=dtype)
        axes |= {2: "max_sequence_length" if name in IN_PLACE else "past_sequence_length"}
        past = [[(cache.clone(), cache.clone()) for _ in range(config.n_layers)]]
        past_axes = [[(axes, axes)] * config.n_layers]
        input_names += cache_names("past_key_values", config)
        outputs += cache_names("present", config)
    with _quiet(), _uncollected(), torch.no_grad():
        program = torch.onnx.export(
            GRAPHS[name](model, int8_cache).eval(),
            (*(tensor for tensor, _ in sample.values()), *past),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=(*(axes for _, axes in sample.values()), *past_axes),
            input_names=input_names,
            output_names=outputs,
            verbose=False,
        )
    assert program is not None
    _strip(program.model)
    return program.model


def _strip(model: ir.Model) -> None:
    """Remove what describes the machine and not the model, and give the outputs their documented axis names."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.shape = value.type = None
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    for value in model.graph.outputs:
        assert value.shape is not None
        grown = ["total_sequence_length" if "+" in str(dim) else dim for dim in value.shape]
        value.shape = ir.Shape(grown)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress lines, and its notes on operators we do not use, off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Put off the search for garbage: a trace makes many objects that stay, and a tenth of its time goes into it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
