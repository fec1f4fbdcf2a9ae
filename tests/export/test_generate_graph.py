"""``generate.onnx`` writes what the book's loop writes, at every supported opset. Choices are clear: see ``sharp``."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from gptedge_export import weights
from gptedge_export.loop import fold_weights, generate_graph
from gptedge_export.trace import trace
from gptedge_export.verify import judge
from gptedge_models import GPTModel, generate_text_simple
from numpy.typing import NDArray

from .conftest import TINY

Ids = NDArray[np.int64]
MIN_MARGIN = 1e-3  # between the two largest logits of every choice, far above the rounding of any CPU


@pytest.fixture(scope="module")
def sharp() -> GPTModel:
    """A model whose choices are clear and vary, since attention counts."""
    torch.manual_seed(31)
    model = GPTModel(TINY).eval()
    for name, weight in model.named_parameters():
        if ".att." in name and name.endswith("weight"):
            weight.data *= 4
    model.out_head.weight.data *= 8
    return model


@pytest.fixture(scope="module", params=[18, 20, 23])
def path(request: pytest.FixtureRequest, sharp: GPTModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(f"opset-{request.param}")
    weights.save({"generate": generate_graph(trace(sharp, "model", request.param), TINY)}, folder)
    return folder / "generate.onnx"


@pytest.fixture(scope="module")
def session(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def draw(*shape: int, seed: int = 0) -> Ids:
    return np.random.default_rng(seed).integers(TINY.vocab_size, size=shape)


def run(session: ort.InferenceSession, rows: list[Ids], max_new_tokens: int, eos_token_id: int = -1) -> Ids:
    """Ids (B, W) of rows that are padded on the left."""
    width = max(len(row) for row in rows)
    feeds = {
        "input_ids": np.stack([np.pad(row, (width - len(row), 0)) for row in rows]),
        "attention_mask": np.stack([np.pad(np.ones_like(row), (width - len(row), 0)) for row in rows]),
        "max_new_tokens": np.array(max_new_tokens),
        "eos_token_id": np.array(eos_token_id),
    }
    output: Ids = session.run(None, feeds)[0]
    np.testing.assert_array_equal(output[:, :width], feeds["input_ids"])
    return output[:, width:]


def book(model: GPTModel, row: Ids, max_new_tokens: int) -> Ids:
    """The new ids of the book's loop, none of which rounding could turn."""
    context = TINY.context_length
    ids = generate_text_simple(model, torch.from_numpy(row)[None], max_new_tokens, context)
    for end in range(len(row), ids.shape[1]):
        with torch.no_grad():
            first, second = torch.topk(model(ids[:, :end][:, -context:])[0, -1], 2).values
        assert first - second > MIN_MARGIN
    new_ids: Ids = ids[0, len(row) :].numpy()
    return new_ids


@pytest.mark.parametrize("max_new_tokens", [0, 1, 2, 40])
@pytest.mark.parametrize("length", [1, 2, 7, 23, 24, 25, 40])
def test_ids_are_the_books_within_and_beyond_the_context(
    length: int, max_new_tokens: int, sharp: GPTModel, session: ort.InferenceSession
) -> None:
    row = draw(length)
    np.testing.assert_array_equal(run(session, [row], max_new_tokens)[0], book(sharp, row, max_new_tokens))


def test_each_row_of_a_left_padded_batch_is_the_row_alone(sharp: GPTModel, session: ort.InferenceSession) -> None:
    """With 30 new tokens the rows leave the context of 24 one after the other."""
    rows = [draw(length, seed=length) for length in (3, 20, 9)]
    np.testing.assert_array_equal(run(session, rows, 30), [book(sharp, row, 30) for row in rows])


def test_padding_longer_than_the_context_changes_nothing(sharp: GPTModel, session: ort.InferenceSession) -> None:
    row = draw(5)
    feeds = {"input_ids": np.pad(row, (40, 0))[None], "attention_mask": np.pad(np.ones_like(row), (40, 0))[None]}
    feeds |= {"max_new_tokens": np.array(8), "eos_token_id": np.array(-1)}
    np.testing.assert_array_equal(session.run(None, feeds)[0][0, 45:], book(sharp, row, 8))


def test_the_end_token_is_the_last(sharp: GPTModel, session: ort.InferenceSession) -> None:
    row = draw(6)
    new_ids = book(sharp, row, 12)
    end = new_ids.tolist().index(new_ids[6]) + 1
    np.testing.assert_array_equal(run(session, [row], 12, eos_token_id=int(new_ids[6]))[0], new_ids[:end])


def test_an_ended_row_is_filled_while_the_others_go_on(sharp: GPTModel, session: ort.InferenceSession) -> None:
    """Beyond the context too: the row that goes on slides while the other stands still."""
    rows = [draw(length, seed=length) for length in (20, 9)]
    ended, others = book(sharp, rows[0], 30), book(sharp, rows[1], 30)
    eos = next(int(i) for i in ended if i not in others)
    end = ended.tolist().index(eos) + 1
    np.testing.assert_array_equal(run(session, rows, 30, eos), [[*ended[:end], *[eos] * (30 - end)], others])


def test_it_stops_when_every_row_has_ended(sharp: GPTModel, session: ort.InferenceSession) -> None:
    row = draw(6)
    new_ids = book(sharp, row, 12)
    end = new_ids.tolist().index(new_ids[6]) + 1
    np.testing.assert_array_equal(run(session, [row, row], 12, int(new_ids[6])), [new_ids[:end]] * 2)


def test_an_end_token_in_the_prompt_ends_nothing(sharp: GPTModel, session: ort.InferenceSession) -> None:
    row = draw(6)
    new_ids = book(sharp, row, 12)
    prompt_id = next(int(i) for i in row if i not in new_ids)
    np.testing.assert_array_equal(run(session, [row], 12, prompt_id)[0], new_ids)


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from nodes(attribute.g)


def test_it_is_valid_and_uses_standard_operators_only(path: Path) -> None:
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(path, load_external_data=False).graph
    assert {node.domain for node in nodes(graph)} == {""}
    assert [node.op_type for node in nodes(graph)].count("Loop") == 2


def test_it_carries_no_metadata(path: Path) -> None:
    model = onnx.load(path, load_external_data=False)
    assert not model.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in nodes(model.graph))


def test_it_brings_no_weights_of_its_own(tiny_bundle: Path) -> None:
    def places(name: str) -> set[str]:
        graph = onnx.load(tiny_bundle / f"onnx/{name}.onnx", load_external_data=False).graph
        assert not any(node.op_type == "Constant" and node.ByteSize() > 2048 for node in nodes(graph))
        return {str(tensor.external_data) for tensor in graph.initializer if tensor.external_data}

    assert places("generate") == places("model")


def test_what_matmulnbits_reads_in_the_loop_is_computed_in_the_loop_from_the_weights(tmp_path: Path) -> None:
    """ONNX Runtime packs no weights of an outer graph, but does pack what it can compute from them beforehand."""
    weight = ir.val("weight", const_value=ir.tensor(np.zeros((8, 1, 16), np.uint8), name="weight"))
    inputs = [ir.val(name) for name in ("step", "goes_on", "x", "scales")]
    product = ir.node("MatMulNBits", [inputs[2], weight, inputs[3]], domain="com.microsoft")
    body = ir.Graph(inputs, [inputs[1], *product.outputs], nodes=[product], name="body")
    loop = ir.node("Loop", [], {"body": body})
    graph = ir.Graph([], loop.outputs, nodes=[loop], initializers=[weight], opset_imports={"": 20}, name="main")
    fold_weights(ir.Model(graph, ir_version=10))
    read = product.inputs[1]
    assert read is not None
    reshape = read.producer()
    assert reshape is not None
    assert reshape.op_type == "Reshape"
    assert reshape.inputs[0] is weight
    assert reshape.graph is body


@pytest.mark.parametrize(
    "spoil",
    [
        lambda ids: ids + np.eye(1, 9, 7, dtype=np.int64),  # another token
        lambda ids: ids[:, :-1],  # too few
        lambda ids: np.pad(ids, ((0, 0), (0, 1))),  # too many
    ],
)
def test_the_export_sees_wrong_ids(spoil: object, sharp: GPTModel) -> None:
    row = draw(5)
    ids = np.concatenate([row, book(sharp, row, 4)])[None]
    assert callable(spoil)
    assert judge(sharp, "", [row], ids, 4, -1).passed
    assert not judge(sharp, "", [row], spoil(ids), 4, -1).passed


def test_the_export_sees_ids_behind_the_end(sharp: GPTModel) -> None:
    row = draw(5)
    ids = np.concatenate([row, book(sharp, row, 4)])[None]
    eos = int(ids[0, 6])
    end = 5 + ids[0, 5:].tolist().index(eos) + 1
    assert judge(sharp, "", [row], ids[:, :end], 4, eos).passed
    assert not judge(sharp, "", [row], ids, 4, eos).passed
