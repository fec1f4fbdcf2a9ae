"""``decode.onnx`` with a large head of 8 bits: 4 bits for all tokens, 8 for the best of them, whatever the company."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from gptedge_export import export_bundle, load_vocabulary, weights
from gptedge_export.blocks import Blocks
from gptedge_export.bundle import _store_weights
from gptedge_export.errors import ParityError
from gptedge_export.graph_run import Graph
from gptedge_export.operators import Ops
from gptedge_export.precision import Prepared, prepare
from gptedge_export.shortlist import N_BEST, _best, look_twice
from gptedge_export.trace import trace
from gptedge_export.verify import Eager
from gptedge_models import GPTConfig, GPTModel
from gptedge_runtime import load
from gptedge_runtime.verify import verify
from numpy.typing import NDArray

CONFIG = GPTConfig(vocab_size=1500, context_length=48, emb_dim=320, n_heads=5, n_layers=1)
IDS = np.random.default_rng(0).integers(CONFIG.vocab_size, size=(3, 12))


@pytest.fixture
def any_head_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptedge_export.quantise.LARGE_HEAD", 1)


def make_model(config: GPTConfig = CONFIG, *, tied: bool = False) -> GPTModel:
    torch.manual_seed(0)
    model = GPTModel(config).eval()
    if tied:
        model.out_head.weight = model.tok_emb.weight
    return model


@pytest.fixture(
    scope="module", params=["int8", "int8, blocks and heads filled up", "int4, tied", "int8, opset 18", "int8, prime"]
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Graph]:
    """A head that is tied to the table has its 8 bits at int4, too."""
    precision, folder = request.param[:4], tmp_path_factory.mktemp("shortlist")
    config = replace(CONFIG, emb_dim=315, n_heads=5) if "filled up" in request.param else CONFIG
    config = replace(config, vocab_size=1511) if "prime" in request.param else config  # no groups of one size
    model = make_model(config, tied="tied" in request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptedge_export.quantise.LARGE_HEAD", 1)
        prepared = prepare(model, precision, [IDS[0].tolist()], progress=False)
    graph = trace(prepared.model, "decode", 18 if "opset 18" in request.param else 20, prepared.int8_cache)
    _store_weights(prepared, "decode", graph, precision)
    (folder / "onnx").mkdir()
    weights.save({"decode": graph}, folder / "onnx")
    return prepared, Graph(folder, "decode", config, precision)


def test_the_best_logits_are_of_8_bits_and_the_others_of_4(made: tuple[Prepared, Graph]) -> None:
    """What lies between either and the model, which rounds inputs as kernels do, is far less than between the two."""
    prepared, graph = made
    with prepared.as_computed():
        exact, rough = Eager(prepared.model, prepared.rough_head)(IDS)
    assert rough is not None
    onnx, apart = graph.prefill(IDS), np.abs(exact - rough).mean()
    order = rough.argsort(axis=-1)
    for logits, ids in ((exact, order[..., -N_BEST // 2 :]), (rough, order[..., : -2 * N_BEST])):
        differences = np.take_along_axis(onnx - logits, ids, -1)
        assert np.abs(differences).mean() < apart / 5


@pytest.mark.parametrize("shape", [(2, 3, 1500), (4, 1500), (4, 1511)])
def test_the_best_are_found_wherever_they_stand(shape: tuple[int, ...]) -> None:
    """Also side by side, in one group; 1511 is a prime, and has none."""
    logits = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    logits[..., 700:720] += 9
    given, ops = ir.val("logits", ir.DataType.FLOAT, shape), Ops()
    found = _best(ops, given, [0] * (len(shape) - 1), shape[-1])
    found.dtype = ir.DataType.INT64
    model = ir.Model(ir.Graph([given], [found], nodes=ops.nodes, opset_imports={"": 20}), ir_version=10)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (ids,) = session.run(None, {"logits": logits})
    np.testing.assert_array_equal(np.sort(ids), np.sort(logits.argsort()[..., -N_BEST:]))


def best(logits: NDArray[Any]) -> dict[int, Any]:
    """The 8 best of logits (V,) by token, which is what the runtime looks at when it tries out a processor's bits."""
    return {int(token): logits[token] for token in logits.argsort()[-8:]}


def test_tokens_read_together_choose_by_the_bits_of_single_ones(made: tuple[Prepared, Graph]) -> None:
    _, graph = made
    together, _ = graph.step(IDS[:1], 0, graph.cache(1, 12))
    cache = graph.cache(1, 12)
    for place in range(12):
        alone, cache = graph.step(IDS[:1, [place]], place, cache)
        assert best(alone[0, 0]) == best(together[0, place])


def test_rows_of_a_batch_choose_by_the_bits_of_single_ones(made: tuple[Prepared, Graph]) -> None:
    _, graph = made
    together, _ = graph.step(IDS, 0, graph.cache(3, 12))
    for row in range(3):
        alone, _ = graph.step(IDS[[row]], 0, graph.cache(1, 12))
        assert [best(logits) for logits in alone[0]] == [best(logits) for logits in together[row]]


@pytest.mark.usefixtures("any_head_is_large")
def test_a_bundle_verifies_and_its_batches_are_single_rows(tmp_path: Path) -> None:
    export_bundle(make_model(), tmp_path / "b", vocabulary=load_vocabulary("bytes"), precision="int8")
    assert verify(tmp_path / "b").graphs == 5
    with load(tmp_path / "b") as gpt:
        prompts = [ids[: 3 + 4 * row].tolist() for row, ids in enumerate(IDS)]
        single = [gpt.generate_ids(prompt, max_new_tokens=20) for prompt in prompts]
        assert gpt.generate_ids(prompts, max_new_tokens=20) == single


@pytest.mark.usefixtures("any_head_is_large")
def test_other_weights_of_4_bits_fail_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look_at_others(graph: ir.Model, rough: Blocks) -> None:
        look_twice(graph, replace(rough, integers=rough.integers.flip(0)))

    monkeypatch.setattr("gptedge_export.bundle.look_twice", look_at_others)
    with pytest.raises(ParityError, match=r"decode\.onnx differs from the model"):
        export_bundle(make_model(), tmp_path / "b", vocabulary=load_vocabulary("bytes"), precision="int8")


@pytest.mark.usefixtures("any_head_is_large")
def test_a_head_of_4_bits_is_looked_at_once() -> None:
    assert prepare(make_model(), "int4", [IDS[0].tolist()], progress=False).rough_head is None


def test_a_small_head_is_looked_at_once() -> None:
    assert prepare(make_model(), "int8", [IDS[0].tolist()], progress=False).rough_head is None


def test_no_logit_of_4_bits_is_chosen(tmp_path: Path, any_head_is_large: None) -> None:
    """Where all rows of the head are all but one, those of 8 bits mostly lie below the best others of 4."""
    model = make_model()
    with torch.no_grad():
        model.out_head.weight[:] = model.out_head.weight[0] + 0.002 * torch.randn(1500, CONFIG.emb_dim)
    prepared = prepare(model, "int8", [IDS[0].tolist()], progress=False)
    graph = trace(prepared.model, "decode", 20, prepared.int8_cache)
    _store_weights(prepared, "decode", graph, "int8")
    (tmp_path / "onnx").mkdir()
    weights.save({"decode": graph}, tmp_path / "onnx")
    with prepared.as_computed():
        exact, rough = Eager(prepared.model, prepared.rough_head)(IDS)
    assert rough is not None
    onnx = Graph(tmp_path, "decode", CONFIG, "int8").prefill(IDS)
    chosen = onnx.argmax(-1, keepdims=True)
    own, other = (np.abs(np.take_along_axis(x, chosen, -1) - onnx.max(-1, keepdims=True)) for x in (exact, rough))
    assert own.max() < other.mean()
