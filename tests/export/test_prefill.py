"""``prefill.onnx``: what it reads is what the model reads, and what is wrong in it fails the export."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from gptedge_export import weights
from gptedge_export.blocks import round_rows
from gptedge_export.errors import ParityError
from gptedge_export.graph_run import Graph
from gptedge_export.precision import Prepared, prepare
from gptedge_export.trace import trace
from gptedge_export.verify import verify_prefill
from gptedge_models import GPTConfig, GPTModel
from numpy.typing import NDArray
from torch import nn

Array = NDArray[Any]
CONFIGS = {
    "blocks filled up": GPTConfig(vocab_size=90, context_length=24, emb_dim=60, n_heads=5, n_layers=2, qkv_bias=True),
    "heads filled up": GPTConfig(vocab_size=90, context_length=24, emb_dim=63, n_heads=9, n_layers=2),
    "one layer": GPTConfig(vocab_size=90, context_length=24, emb_dim=64, n_heads=4, n_layers=1),
}
IDS = np.random.default_rng(0).integers(90, size=(1, 24))


@functools.cache
def _traced(config: str, precision: str, opset: int) -> tuple[Prepared, dict[str, ir.Model]]:
    torch.manual_seed(0)
    prepared = prepare(GPTModel(CONFIGS[config]), precision, [IDS[0].tolist()], progress=False)
    assert prepared.store_prefill is not None
    graphs = {name: trace(prepared.model, name, opset, prepared.int8_cache) for name in ("prefill", "decode")}
    prepared.store_prefill(graphs["prefill"])
    prepared.store(graphs["decode"])
    return prepared, graphs


def make(config: str, precision: str = "int8", opset: int = 20) -> tuple[Prepared, dict[str, ir.Model]]:
    """Only the two graphs that read a prompt, of one of ``CONFIGS``; each caller has its own."""
    prepared, graphs = _traced(config, precision, opset)
    return prepared, {name: graph.clone() for name, graph in graphs.items()}


def save(graphs: dict[str, ir.Model], folder: Path) -> int:
    """Returns the bytes of the weights."""
    (folder / "onnx").mkdir(parents=True)
    weights.save(graphs, folder / "onnx")
    return (folder / "onnx" / "model.onnx_data").stat().st_size


@pytest.fixture(params=["int8", "int4"])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[*CONFIGS, "opset 18"])
def exported(request: pytest.FixtureRequest, precision: str, tmp_path: Path) -> tuple[Prepared, Path]:
    is_old = request.param == "opset 18"
    prepared, graphs = make("blocks filled up", precision, 18) if is_old else make(request.param, precision)
    save(graphs, tmp_path)
    return prepared, tmp_path


def read(prepared: Prepared, folder: Path, cuts: list[int], activation_max: int = 63) -> list[Array]:
    """Keys and values of ``IDS``, read in these parts."""
    prefill, decode = (Graph(folder, name, prepared.model.config, "int8") for name in ("prefill", "decode"))
    buffers = decode.cache(1, 24)
    for begin, end in zip([0, *cuts], [*cuts, 24], strict=True):
        is_exact = prefill.read(IDS[:, begin:end], begin, buffers, activation_max)
    if activation_max == 127 and not is_exact:
        pytest.skip("this processor cuts sums of 8-bit products off")
    return buffers


def of_model(prepared: Prepared, activation_max: int) -> list[Array]:
    """Keys and values (1, n_heads, 23, width) of all but the last of ``IDS``."""
    config, found = prepared.model.config, list[Array]()

    def keep(_: nn.Module, __: Any, output: torch.Tensor) -> None:
        rows = output.view(1, 24, config.n_heads, -1).transpose(1, 2)[:, :, :23].numpy()
        found.append(np.pad(rows, [(0, 0)] * 3 + [(0, -config.head_dim % 8)]))

    blocks: list[Any] = [*prepared.model.trf_blocks]
    handles = [layer.register_forward_hook(keep) for block in blocks for layer in (block.att.W_key, block.att.W_value)]
    with torch.no_grad(), prepared.as_computed(23, activation_max):
        prepared.model(torch.from_numpy(IDS))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("activation_max", [63, 127])
def test_keys_and_values_are_the_models(exported: tuple[Prepared, Path], activation_max: int) -> None:
    """Both round inputs row by row; where float32 adds in another order, a last bit turns a few by a step."""
    prepared, folder = exported
    found = read(prepared, folder, [], activation_max)
    for graph, model in zip(found, of_model(prepared, activation_max), strict=True):
        differences = np.abs(graph[:, :, :23].astype(int) - model)
        assert differences.max() <= 1
        assert (differences > 0).mean() < 0.02


def test_in_parts_it_reads_the_same(exported: tuple[Prepared, Path]) -> None:
    prepared, folder = exported
    for whole, parts in zip(read(prepared, folder, []), read(prepared, folder, [2, 9, 22]), strict=True):
        assert np.abs(whole.astype(int) - parts).max() <= 1


def test_it_is_held_against_the_model(exported: tuple[Prepared, Path], precision: str) -> None:
    prepared, folder = exported
    checks = verify_prefill(prepared, folder, precision=precision)
    assert {check.graph for check in checks} == {"prefill"}
    assert max(check.length for check in checks) == 8


@pytest.mark.parametrize(
    ("precision", "part"), [("int8", "steps"), ("int8", "rows"), ("int4", "scales"), ("int4", "integers")]
)
def test_another_weight_fails_the_export(precision: str, part: str, tmp_path: Path) -> None:
    prepared, graphs = make("one layer", precision)
    values = graphs["prefill"].graph.initializers
    (name,) = (name for name in values if ".qkv." in name and name.endswith(f".{part}"))
    given = values[name].const_value
    assert given is not None
    values[name].const_value = ir.tensor(given.numpy()[::-1].copy(), name=name)
    save(graphs, tmp_path)
    with pytest.raises(ParityError, match=r"prefill\.onnx differs from the model by"):
        verify_prefill(prepared, tmp_path, precision=precision)


def test_the_weights_are_stored_once(precision: str, tmp_path: Path) -> None:
    """But for a step each output, of which all its scales are multiples."""
    _, graphs = make("one layer", precision)
    alone = save({"decode": graphs["decode"]}, tmp_path / "alone")
    assert save(graphs, tmp_path / "both") < 1.05 * alone


def test_attention_lets_go_of_all_that_it_makes() -> None:
    """ONNX Runtime frees a value behind the last node that reads it, and at the end of a run if there is none."""
    nodes = list(make("heads filled up")[1]["prefill"].graph)
    places = [place for place, node in enumerate(nodes) if node.op_type == "GroupQueryAttention"]
    assert places
    for place, following in zip(places, [*places[1:], -1], strict=True):  # which reads them where it is the second half
        readers = {nodes[place + 1], nodes[place + 2], nodes[following]}
        assert all(readers & set(value.consumers()) for value in nodes[place].outputs[1:])


def test_nothing_is_transposed_between_the_layers_of_the_feed_forward() -> None:
    """They take and give columns, four times as many as a layer has inputs; GELU does not mind."""
    (gelu,) = (node for node in make("heads filled up")[1]["prefill"].graph if node.op_type == "Gelu")
    assert [node.op_type for node in (gelu.predecessors()[0], *gelu.successors())] == ["Add", "Abs", "Div"]


@pytest.mark.parametrize("activation_max", [63, 127])
def test_rows_are_rounded_by_themselves_and_zeros_stay_zeros(activation_max: int) -> None:
    x = torch.tensor([[1.0, -0.25, 0.0], [100.0, 1.0, -25.0], [0.0, 0.0, 0.0]])
    integers = round_rows(x, activation_max) * activation_max / torch.tensor([[1.0], [100.0], [1.0]])
    quarter = (activation_max + 1) // 4  # of an odd number, it rounds up
    wanted = torch.tensor([[activation_max, -quarter, 0.0], [activation_max, 1, -quarter], [0, 0, 0]])
    torch.testing.assert_close(integers, wanted)


def test_a_processor_that_cuts_sums_off_reads_with_fewer_bits(tmp_path: Path) -> None:
    """As if this one did so: the sums of the example are held against others."""
    prepared, graphs = make("one layer")
    for node in graphs["prefill"].graph:
        if node.op_type == "Constant" and node.attributes["value"].as_tensor().numpy().tolist() == 64 * 255 * 127:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.int32(64 * 32767)))
    save(graphs, tmp_path)
    prefill, decode = (Graph(tmp_path, name, prepared.model.config, "int8") for name in ("prefill", "decode"))
    buffers, fewer = decode.cache(1, 24), decode.cache(1, 24)
    assert not prefill.read(IDS, 0, buffers, 127)
    assert not prefill.read(IDS, 0, fewer, 63)
    assert all(np.array_equal(a, b) for a, b in zip(buffers, fewer, strict=True))
    assert {check.case.rsplit(" ", 1)[1] for check in verify_prefill(prepared, tmp_path, precision="int8")} == {"63"}
