"""The graphs compute what the model computes. Bound: see ``gptedge_export.verify``."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from gptedge_export import Vocabulary, export_bundle
from gptedge_export.graph_run import Graph
from gptedge_export.verify import ATOL, RTOL
from gptedge_models import GPTConfig, GPTModel
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from .conftest import TINY


def eager(model: GPTModel, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.from_numpy(ids)).numpy()
    return logits


def bound(logits: NDArray[np.float32]) -> float:
    return max(ATOL, RTOL["fp32"] * float(np.abs(logits).max()))


@pytest.mark.parametrize("length", range(1, TINY.context_length + 1))
@pytest.mark.parametrize("name", ["forward", "model", "decode"])
def test_logits_match_eager_at_every_length(name: str, length: int, tiny_model: GPTModel, tiny_bundle: Path) -> None:
    graph = Graph(tiny_bundle, name, TINY)
    ids = np.random.default_rng(length).integers(TINY.vocab_size, size=(2, length))
    expected = eager(tiny_model, ids)
    logits = graph.run(input_ids=ids)[0] if name == "forward" else graph.prefill(ids)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=bound(expected))


@pytest.mark.parametrize("name", ["model", "decode"])
def test_one_token_at_a_time_matches_the_whole_sequence(name: str, tiny_model: GPTModel, tiny_bundle: Path) -> None:
    graph = Graph(tiny_bundle, name, TINY)
    ids = np.random.default_rng(0).integers(TINY.vocab_size, size=(2, TINY.context_length))
    expected = eager(tiny_model, ids)
    cache = graph.cache(2, TINY.context_length)
    for past in range(TINY.context_length):
        logits, cache = graph.step(ids[:, past : past + 1], past, cache)
        np.testing.assert_allclose(logits[:, 0], expected[:, past], rtol=0, atol=bound(expected))


def test_logits_are_those_of_the_positions_asked_for(tiny_model: GPTModel, tiny_bundle: Path) -> None:
    """In each row's own order: only these rows are computed behind the last attention."""
    graph, wanted = Graph(tiny_bundle, "decode", TINY), np.array([[3, 0], [1, 4]])
    ids = np.random.default_rng(0).integers(TINY.vocab_size, size=(2, 5))
    logits, _ = graph.decode(ids, np.tile(np.arange(5), (2, 1)), np.full(2, 5), wanted, graph.cache(2, 5))
    expected = eager(tiny_model, ids)[np.arange(2)[:, None], wanted]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=bound(expected))


configs = st.builds(
    lambda heads, head_dim, **sizes: GPTConfig(n_heads=heads, emb_dim=heads * head_dim, **sizes),
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([5, 8, 16, 40]),
    vocab_size=st.sampled_from([257, 300, 1024]),
    context_length=st.sampled_from([1, 2, 3, 17, 40]),
    n_layers=st.integers(1, 2),
    qkv_bias=st.booleans(),
)


@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # an export takes seconds, shrinking would take many
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(config=configs, tied=st.booleans())
def test_any_config_exports_and_agrees(
    config: GPTConfig, tied: bool, byte_vocabulary: Vocabulary, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model = GPTModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms that are not the identity. Larger weights would test float32 and not the graphs: at four times these
            # the eager model itself is 8e-4 of its largest logit away from its own float64.
            parameter.add_(torch.randn_like(parameter) * 0.02)
    if tied:
        model.out_head.weight = model.tok_emb.weight
    report = export_bundle(model, tmp_path / "bundle", vocabulary=byte_vocabulary, force=True)
    assert all(check.passed for check in report.checks)


def test_axes_are_dynamic_and_named(tiny_bundle: Path) -> None:
    graph = onnx.load(tiny_bundle / "onnx" / "model.onnx", load_external_data=False).graph
    values = [*graph.input, *graph.output]
    axes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    past = ["batch_size", 4, "past_sequence_length", 8]
    total = ["batch_size", 4, "total_sequence_length", 8]
    caches = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert axes == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        "logits": ["batch_size", "sequence_length", 300],
        **{f"past_key_values.{name}": past for name in caches},
        **{f"present.{name}": total for name in caches},
    }


@pytest.mark.parametrize("name", ["forward", "model"])
def test_the_portable_graphs_use_standard_operators_only(name: str, tiny_bundle: Path) -> None:
    model = onnx.load(tiny_bundle / "onnx" / f"{name}.onnx", load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    onnx.checker.check_model(str(tiny_bundle / "onnx" / f"{name}.onnx"), full_check=True)


@pytest.mark.parametrize("name", ["forward", "model", "decode"])
def test_graphs_carry_no_metadata(name: str, tiny_bundle: Path) -> None:
    model = onnx.load(tiny_bundle / "onnx" / f"{name}.onnx", load_external_data=False)
    assert not model.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert str(Path.cwd()).encode() not in model.SerializeToString()
