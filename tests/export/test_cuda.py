"""``--cuda``: which bundles get the graph for GPUs; tests/gpu holds what it computes."""

from pathlib import Path

import pytest
from gptedge_export import ExportError, Vocabulary, export_bundle
from gptedge_models import GPTModel


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_precision_that_has_no_graph_for_cuda_is_refused(
    tiny_model: GPTModel, byte_vocabulary: Vocabulary, tmp_path: Path, precision: str
) -> None:
    with pytest.raises(ExportError, match=rf"{precision} has no graph for CUDA: take fp16 or fp32"):
        export_bundle(tiny_model, tmp_path / "out", vocabulary=byte_vocabulary, precision=precision, cuda=True)
    assert not (tmp_path / "out").exists()


def test_the_graph_is_only_in_a_bundle_that_asked_for_it(tiny_bundle: Path) -> None:
    assert not (tiny_bundle / "onnx/decode_cuda.onnx").exists()
