import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from gptedge_export import ExportError, Vocabulary, export_bundle, graphs
from gptedge_export.errors import ParityError
from gptedge_export.verify import lengths, verify
from gptedge_models import GPTConfig, GPTModel

from .conftest import TINY


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def exported_again(
    tiny_model: GPTModel, tiny_bundle: Path, byte_vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Over a copy of the first export, which has one file more."""
    bundle = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("again") / "bundle")
    (bundle / "extra").write_text("from an older export")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"].append({"path": "extra"})
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    export_bundle(tiny_model, bundle, vocabulary=byte_vocabulary, force=True)
    return bundle


def test_two_exports_are_byte_identical(tiny_bundle: Path, exported_again: Path) -> None:
    again, before = files(exported_again), files(tiny_bundle)
    assert again.keys() == before.keys()
    assert [name for name, data in again.items() if data != before[name]] == []


def test_the_manifest_names_every_other_file(tiny_bundle: Path) -> None:
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    listed = {entry["path"] for entry in manifest["files"]}
    assert listed == files(tiny_bundle).keys() - {"manifest.json"}


def test_equal_weights_are_stored_once(tiny_bundle: Path, byte_vocabulary: Vocabulary, tmp_path: Path) -> None:
    model = GPTModel(TINY)
    model.out_head.weight = torch.nn.Parameter(model.tok_emb.weight.detach().clone())
    tied = export_bundle(model, tmp_path / "tied", vocabulary=byte_vocabulary).path
    saved = (tiny_bundle / "onnx/model.onnx_data").stat().st_size - (tied / "onnx/model.onnx_data").stat().st_size
    assert saved == TINY.vocab_size * TINY.emb_dim * 4


def test_the_weights_file_is_no_larger_than_the_weights(tiny_model: GPTModel, tiny_bundle: Path) -> None:
    weights = sum(parameter.numel() * 4 for parameter in tiny_model.parameters())
    size = (tiny_bundle / "onnx/model.onnx_data").stat().st_size
    assert size <= weights + 64 * len(list(tiny_model.parameters()))  # each tensor begins at a multiple of 64


def test_a_graph_that_disagrees_writes_nothing(
    tiny_model: GPTModel, byte_vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def softer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return graphs_attention(q * 0.99, k, v, bias)

    graphs_attention = graphs.attention
    monkeypatch.setattr(graphs, "attention", softer)
    with pytest.raises(ParityError, match=r"differs from the model by .* the bound is .* nothing was written"):
        export_bundle(tiny_model, tmp_path / "bundle", vocabulary=byte_vocabulary)
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_not_numbers_on_either_side_fail(
    tiny_model: GPTModel, tiny_bundle: Path, tmp_path: Path
) -> None:
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        model.final_norm.scale[0] = torch.nan
    with pytest.raises(ParityError, match="by nan"):
        verify(model, tiny_bundle)
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    data = bundle / "onnx/model.onnx_data"
    data.write_bytes(b"\xff" * data.stat().st_size)  # every float32 is NaN
    for either in (model, tiny_model):
        with pytest.raises(ParityError, match="by nan"):
            verify(either, bundle)


def test_an_existing_bundle_needs_force(tiny_model: GPTModel, tiny_bundle: Path, byte_vocabulary: Vocabulary) -> None:
    before = files(tiny_bundle)
    with pytest.raises(ExportError, match="use --force"):
        export_bundle(tiny_model, tiny_bundle, vocabulary=byte_vocabulary)
    assert files(tiny_bundle) == before


def test_a_folder_that_is_no_bundle_is_never_replaced(
    tiny_model: GPTModel, byte_vocabulary: Vocabulary, tmp_path: Path
) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"dear")
    with pytest.raises(ExportError, match="no bundle"):
        export_bundle(tiny_model, tmp_path, vocabulary=byte_vocabulary, force=True)
    assert files(tmp_path) == {"photo.jpg": b"dear"}


def test_force_replaces_and_leaves_nothing_behind(exported_again: Path) -> None:
    assert not (exported_again / "extra").exists()
    assert list(exported_again.parent.iterdir()) == [exported_again]


def test_a_tokenizer_larger_than_the_model_is_refused(byte_vocabulary: Vocabulary, tmp_path: Path) -> None:
    model = GPTModel(GPTConfig(vocab_size=256, context_length=8, emb_dim=8, n_heads=1, n_layers=1))
    with pytest.raises(ExportError, match="tokenizer has 257 tokens, the model only 256"):
        export_bundle(model, tmp_path / "bundle", vocabulary=byte_vocabulary)


@pytest.mark.parametrize("opset", [18, 23])
def test_other_opsets_agree_too(opset: int, tiny_model: GPTModel, byte_vocabulary: Vocabulary, tmp_path: Path) -> None:
    report = export_bundle(tiny_model, tmp_path / "bundle", vocabulary=byte_vocabulary, opset=opset)
    assert all(check.passed for check in report.checks)


@pytest.mark.parametrize("opset", [17, 24])
def test_an_opset_out_of_range_is_refused(
    opset: int, tiny_model: GPTModel, byte_vocabulary: Vocabulary, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=f"opset {opset} is not supported: choose from 18 to 23"):
        export_bundle(tiny_model, tmp_path / "bundle", vocabulary=byte_vocabulary, opset=opset)


def test_verification_visits_every_power_of_two_and_both_ends() -> None:
    assert lengths(1024) == sorted({1, 2, 3, *(2**k + d for k in range(2, 11) for d in (-1, 0, 1))} - {1025})
    assert lengths(1) == [1]
