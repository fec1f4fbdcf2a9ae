"""``--cuda``: which bundles get the graph for GPUs; tests/gpu holds what it computes."""

import copy
import json
from pathlib import Path

import onnx
import pytest
import torch
from gptedge_export import ExportError, Vocabulary, export_bundle
from gptedge_export.cuda import CUDA_DTYPES
from gptedge_export.precision import prepare
from gptedge_export.verify import RTOL
from gptedge_models import GPTConfig, GPTModel
from gptedge_runtime.cuda import HALF_ERROR
from onnx import TensorProto

from ..make_bundles import TINY, random_model

BFLOAT16_ON_CUDA = {
    "Add",
    "Cast",
    "FastGelu",
    "Gather",
    "GatherElements",
    "Gemm",
    "GroupQueryAttention",
    "LayerNormalization",
    "Reshape",
    "SkipLayerNormalization",
    "Slice",
}


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_precision_that_has_no_graph_for_cuda_is_refused(
    tiny_model: GPTModel, byte_vocabulary: Vocabulary, tmp_path: Path, precision: str
) -> None:
    with pytest.raises(ExportError, match=rf"{precision} has no graph for CUDA: take fp16, bf16 or fp32"):
        export_bundle(tiny_model, tmp_path / "out", vocabulary=byte_vocabulary, precision=precision, cuda=True)
    assert not (tmp_path / "out").exists()


def test_the_graph_is_only_in_a_bundle_that_asked_for_it(tiny_bundle: Path) -> None:
    assert not (tiny_bundle / "onnx/decode_cuda.onnx").exists()


@pytest.fixture(scope="module", params=[(32, 4), (15, 3)], ids=["heads of 8", "heads of 5"])
def bf16_bundle(
    request: pytest.FixtureRequest, byte_vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    torch.manual_seed(0)
    width, n_heads = request.param
    config = GPTConfig(vocab_size=257, context_length=9, emb_dim=width, n_heads=n_heads, n_layers=1, qkv_bias=True)
    path = tmp_path_factory.mktemp("bf16") / "bundle"
    export_bundle(GPTModel(config).eval(), path, vocabulary=byte_vocabulary, precision="bf16", cuda=True)
    return path


def test_bfloat16_is_held_to_the_bound_of_float32(bf16_bundle: Path) -> None:
    """The CPU has no kernels for it: what is held is the graph with float32 in its place, and the same weights."""
    checks = json.loads((bf16_bundle / "export_report.json").read_text("utf-8"))["checks"]
    on_cuda = [check for check in checks if check["graph"] == "decode_cuda"]
    assert {check["case"] for check in on_cuda} == {"prefill", "step by step", "ragged batch"}
    largest = max(check["bound"] for check in checks if check["graph"] == "forward")
    assert all(check["max_abs_diff"] <= check["bound"] <= 1.2 * largest for check in on_cuda)


@pytest.mark.parametrize(("precision", "min_top1"), [("fp16", 0.98), ("bf16", 0.9)])
def test_the_bounds_on_a_gpu_are_kept_by_pytorch_in_16_bits(precision: str, min_top1: float) -> None:
    """Those of docs/cuda.md, with the model of tests/gpu; PyTorch rounds between operators as a GPU does."""
    model = prepare(random_model(TINY), precision, [], progress=False).model
    ids = torch.randint(model.config.vocab_size, (20, model.config.context_length), generator=torch.manual_seed(0))
    with torch.no_grad():
        logits, rounded = model(ids), copy.deepcopy(model).to(CUDA_DTYPES[precision])(ids).float()
    assert (logits - rounded).abs().max() <= HALF_ERROR[precision] * RTOL[precision] * logits.abs().max()
    assert (logits.argmax(-1) == rounded.argmax(-1)).float().mean() >= min_top1


def test_all_that_is_computed_in_bfloat16_cuda_has_kernels_for(bf16_bundle: Path) -> None:
    """ONNX Runtime's docs/OperatorKernels.md lists them; Pad, for one, is not among them."""
    model = onnx.load(bf16_bundle / "onnx/decode_cuda.onnx", load_external_data=False)
    types = {weight.name: weight.data_type for weight in model.graph.initializer}
    types |= {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    on_bfloat16 = set()
    for node in model.graph.node:
        inputs = [types.get(name, TensorProto.FLOAT) for name in node.input]
        if TensorProto.BFLOAT16 in inputs:
            on_bfloat16.add(node.op_type)
        to = {attribute.name: attribute.i for attribute in node.attribute}.get("to")
        types |= dict.fromkeys(
            node.output, to or (TensorProto.BFLOAT16 if TensorProto.BFLOAT16 in inputs else inputs[0])
        )
    assert on_bfloat16 <= BFLOAT16_ON_CUDA
    assert {"Gemm", "GroupQueryAttention", "SkipLayerNormalization"} <= on_bfloat16
