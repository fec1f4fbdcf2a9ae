"""``decode.onnx`` at int4: a row of a short sequence has the bits that it has alone, a prompt is read at once.

The head alone gets all rows of a sequence at once, and adds in another order where they are several.
"""

from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from gptedge_export.precision import prepare
from gptedge_export.reshapes import drop_reshapes
from gptedge_export.rows import BY_ROW_TOKENS, compute_by_row
from gptedge_export.trace import trace
from gptedge_models import GPTConfig, GPTModel
from gptedge_runtime.ort import attention_of_cache
from gptedge_runtime.speculate import LONG
from numpy.typing import NDArray

Graphs = tuple[GPTConfig, dict[str, ir.Model]]


@pytest.fixture(scope="module", params=[(64, 20), (63, 20), (64, 18)])
def graphs(request: pytest.FixtureRequest) -> Graphs:
    """The same model by row and all rows at once, wide enough for blocks that kernels add in different orders.

    Heads of 63 channels are filled up in the cache; at opset 18 GELU is several operators.
    """
    torch.manual_seed(0)
    head_dim, opset = request.param
    config = GPTConfig(vocab_size=90, context_length=40, emb_dim=8 * head_dim, n_heads=8, n_layers=2)
    return config, both(GPTModel(config), opset)


def both(model: GPTModel, opset: int) -> dict[str, ir.Model]:
    prepared = prepare(model, "int4", [[*range(40)]], progress=False)
    made = {}
    for name, change in (("by row", partial(compute_by_row, width=model.config.emb_dim)), ("at once", drop_reshapes)):
        made[name] = trace(prepared.model, "decode", opset, prepared.int8_cache)
        prepared.store(made[name])
        change(made[name])
    return made


def opened(graph: ir.Model) -> ort.InferenceSession:
    with attention_of_cache(True):
        return ort.InferenceSession(
            ir.to_proto(graph).SerializeToString(),
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["SkipLayerNormFusion"],  # it adds in another order, and is kept from a Scan's body
        )


def step(
    session: ort.InferenceSession, ids: NDArray[Any], past: int, cache: dict[str, Any], first: int = 0
) -> NDArray[Any]:
    """Logits (B, S - first, V) of all but the first of ids (B, S) behind ``past`` tokens; the cache is written on."""
    batch, size = ids.shape
    for given in session.get_inputs():
        if given.name.startswith("past") and given.name not in cache:
            cache[given.name] = np.zeros((batch, given.shape[1], 40, given.shape[3]), np.int8)
    feeds = {
        "input_ids": ids,
        "position_ids": np.tile(np.arange(past, past + size), (batch, 1)),
        "seqlens_k": np.full(batch, past + size - 1, np.int32),
        "total_sequence_length": np.array(past + size, np.int32),
        "logit_positions": np.tile(np.arange(first, size), (batch, 1)),
    }
    logits, *present = session.run(None, feeds | cache)
    cache.update(zip(list(cache), present, strict=True))
    return np.asarray(logits)


@pytest.mark.parametrize("size", [2, 7, BY_ROW_TOKENS])
def test_tokens_read_together_have_the_bits_of_single_ones(graphs: Graphs, size: int) -> None:
    session = opened(graphs[1]["by row"])
    ids, plain_cache, cache = np.arange(size + 1)[None] * 5, dict[str, Any](), dict[str, Any]()
    plain = [step(session, ids[:, [place]], place, plain_cache)[0, 0] for place in range(size + 1)]
    step(session, ids[:, :1], 0, cache)
    for first in range(size):
        logits = step(session, ids[:, 1 : first + 2], 1, cache, first)
        np.testing.assert_array_equal(logits[0, 0], plain[first + 1])
    for name, array in plain_cache.items():
        np.testing.assert_array_equal(cache[name], array)


def test_the_logits_of_tokens_read_together_differ_in_last_bits_at_most(graphs: Graphs) -> None:
    """A quarter of the bound of parity: where two choices are as close, the runtime reads again."""
    session = opened(graphs[1]["by row"])
    ids, cache = np.arange(BY_ROW_TOKENS)[None] * 5, dict[str, Any]()
    together = step(session, ids, 0, cache)[0]
    plain = [step(session, ids[:, [place]], place, cache)[0, 0] for place in range(BY_ROW_TOKENS)]
    np.testing.assert_allclose(together, plain, rtol=0, atol=0.25 * 2e-5 * np.abs(plain).max())


def test_rows_of_a_batch_have_the_bits_of_single_ones(graphs: Graphs) -> None:
    session = opened(graphs[1]["by row"])
    ids = np.array([[3, 14], [15, 9], [26, 5]])
    cache = dict[str, Any]()
    batch = [step(session, ids[:, [place]], place, cache) for place in range(2)]
    for row in range(3):
        cache.clear()
        for place in range(2):
            np.testing.assert_array_equal(step(session, ids[[row]][:, [place]], place, cache)[0], batch[place][row])


def test_a_longer_sequence_is_computed_at_once(graphs: Graphs) -> None:
    """It has the bits of the graph that knows no rows."""
    ids = np.arange(BY_ROW_TOKENS + 1)[None] * 5
    by_row, at_once = (step(opened(graphs[1][name]), ids, 0, {}) for name in ("by row", "at once"))
    np.testing.assert_array_equal(by_row, at_once)


def test_weights_are_constants_where_they_are_used(graphs: Graphs) -> None:
    """ONNX Runtime packs no others, and is ten times as slow."""
    config, made = graphs
    kernels = [node for node in made["by row"].graph.all_nodes() if node.op_type == "MatMulNBits"]
    assert len(kernels) == 4 * config.n_layers + 1
    for node in kernels:
        assert node.graph is not made["by row"].graph
        assert all(value.graph is node.graph for value in node.inputs[1:3] if value is not None)


def test_layers_with_equal_biases_compute_by_row() -> None:
    """Equal weights are one in a graph, and two layers between the same attentions then ask for it."""
    model = GPTModel(GPTConfig(vocab_size=90, context_length=40, emb_dim=64, n_heads=8, n_layers=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(0.5)
    by_row, at_once = (step(opened(graph), np.array([[5]]), 0, {}) for graph in both(model, 20).values())
    np.testing.assert_array_equal(by_row, at_once)


def test_no_step_with_drafts_is_longer_than_what_is_computed_by_row() -> None:
    assert max(LONG.sizes) <= BY_ROW_TOKENS
