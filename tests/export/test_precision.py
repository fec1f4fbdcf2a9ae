"""fp16, int8 and int4: what is stored is what the kernels read, and what it costs is measured and bounded."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from gptedge_export import ExportError, Vocabulary, export_bundle, load_vocabulary
from gptedge_export.blocks import Blocks, block_size, round_by_inputs, round_to_nearest
from gptedge_export.cli import command
from gptedge_export.errors import ParityError
from gptedge_export.precision import BITS, _digest, prepare
from gptedge_export.quality import MIN_TOP1_AGREEMENT, measure, sample_texts
from gptedge_export.quantise import _smooth, quantise
from gptedge_export.reshapes import drop_reshapes
from gptedge_export.trace import trace
from gptedge_export.verify import RTOL
from gptedge_models import GPTConfig, GPTModel, demo, load_checkpoint
from gptedge_runtime import load
from gptedge_runtime.cli import cli as gptedge
from gptedge_runtime.verify import verify
from onnx import TensorProto, helper, numpy_helper

ODD = GPTConfig(vocab_size=257, context_length=9, emb_dim=15, n_heads=3, n_layers=1, drop_rate=0.0)
PROMPT = "One windy day, Leo"
TEXTS = (PROMPT, "Once", "One morning, Mia went to the market. She")


@pytest.fixture(scope="module")
def demo_vocabulary() -> Vocabulary:
    return load_vocabulary(str(Path(demo.__path__[0]) / "tokenizer.tiktoken"))


@pytest.fixture(scope="module", params=["fp16", "bf16", "int8", "int4"])
def demo_bundle(
    request: pytest.FixtureRequest, demo_vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("precision") / str(request.param)
    export_bundle(load_checkpoint("demo"), path, vocabulary=demo_vocabulary, precision=request.param)
    return path


def matmul_nbits(blocks: Blocks) -> onnx.ModelProto:
    n_rows, _, size = blocks.integers.shape
    attributes: dict[str, Any] = {"K": blocks.width, "N": n_rows, "bits": blocks.bits, "block_size": size}
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **attributes)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", "k"]) for name in "xy"]
    tensors = [(blocks.packed(), "w"), (blocks.scales[..., 0].contiguous(), "s")]
    weights = [numpy_helper.from_array(tensor.numpy(), name) for tensor, name in tensors]
    graph = helper.make_graph([node], "", values[:1], values[1:], weights)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [15, 16, 40, 64, 100, 192])
def test_matmul_nbits_reads_the_stored_integers_as_dense_says(bits: int, width: int) -> None:
    torch.manual_seed(0)
    blocks = round_to_nearest(torch.randn(7, width), bits)
    session = ort.InferenceSession(matmul_nbits(blocks).SerializeToString(), providers=["CPUExecutionProvider"])
    (rows,) = session.run(None, {"x": np.eye(width, dtype=np.float32)})
    np.testing.assert_array_equal(rows.T, blocks.dense().numpy())  # one product each, the other terms are zero


@pytest.mark.parametrize(
    ("width", "bits", "size"),
    [(1, 4, 16), (15, 8, 16), (65, 4, 16), (128, 8, 32), (520, 4, 32), (768, 4, 256), (768, 8, 64), (1600, 4, 128)],
)
def test_a_block_is_a_third_of_its_row_at_most_and_wastes_little(width: int, bits: int, size: int) -> None:
    assert block_size(width, bits) == size


@pytest.mark.parametrize(("bits", "error"), [(8, 0.01), (4, 0.12)])
def test_rounding_to_nearest_loses_what_the_bits_allow(bits: int, error: float) -> None:
    """Of normal weights: a step is about 2.5 sigma / 2^(bits-1), its RMS error step / sqrt(12); 20 % of slack."""
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    assert (round_to_nearest(weight, bits).dense() - weight).square().mean().sqrt() < error


def test_rounding_by_inputs_loses_less_in_the_outputs() -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(32, 128), torch.randn(500, 16) @ torch.randn(16, 128) + 0.1 * torch.randn(500, 128)
    moments = (inputs.T @ inputs).double()
    errors = [
        ((blocks.dense() - weight) @ inputs.T).square().mean()
        for blocks in (round_by_inputs(weight, 4, moments), round_to_nearest(weight, 4))
    ]
    assert errors[0] < 0.5 * errors[1]  # these inputs leave many directions in which errors cost nothing


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_multiples_of_their_rows_steps_and_have_8_bits(bits: int) -> None:
    """By which ``prefill.onnx`` multiplies whole rows of integers, with whatever scales their blocks have."""
    torch.manual_seed(0)
    weight = torch.randn(32, 192) * torch.rand(32, 12).repeat_interleave(16, dim=1) ** 3
    blocks = round_by_inputs(weight, bits, torch.eye(192, dtype=torch.float64), by_row=True)
    assert blocks.steps is not None
    multiples = blocks.integers * blocks.scales / blocks.steps[:, None]
    torch.testing.assert_close(multiples, multiples.round(), rtol=0, atol=1e-4)  # float32's division
    assert multiples.min() > -128.5
    assert multiples.max() < 127.5


@pytest.mark.parametrize("width", [768, 3072])
def test_scales_that_are_multiples_lose_little(width: int) -> None:
    """Of weights that fall as they do in GPT-2: a scale is up to a thirtieth of its row's largest from the best."""
    torch.manual_seed(0)
    weight, moments = torch.randn(64, width), torch.eye(width, dtype=torch.float64)
    free, whole = (round_by_inputs(weight, 4, moments, by_row=by_row).dense() for by_row in (False, True))
    assert (whole - weight).square().mean() < 1.02 * (free - weight).square().mean()


def test_a_zero_matrix_stays_zero() -> None:
    weight, moments = torch.zeros(3, 20), torch.zeros(32, 32, dtype=torch.float64)
    by_inputs = [round_by_inputs(weight, bits, moments, by_row=by_row) for bits in (4, 8) for by_row in (False, True)]
    for blocks in (round_to_nearest(weight, 4), *by_inputs):
        assert torch.equal(blocks.dense(), weight)


def test_the_demo_keeps_its_choices(demo_bundle: Path) -> None:
    report = json.loads((demo_bundle / "export_report.json").read_text())
    quality = report["quality"]
    assert quality["judged"] == ["top1_agreement", "kl_nats"]
    assert quality["top1_agreement"] >= MIN_TOP1_AGREEMENT[report["precision"]]
    assert abs(quality["perplexity"] / quality["fp32_perplexity"] - 1) < 0.01
    assert len(quality["greedy_tokens"]) == 4


def test_a_bundle_of_the_demo_verifies_and_tells(demo_bundle: Path) -> None:
    assert verify(demo_bundle).graphs == (5 if demo_bundle.name in BITS else 4)  # and prefill
    with load(demo_bundle) as gpt:
        assert gpt.generate(PROMPT, max_new_tokens=80).startswith(" found ")


@pytest.mark.parametrize("head_dim", [8, 5])
def test_nothing_is_reshaped_between_the_kernels(head_dim: int) -> None:
    """Heads that fill no 8 channels of the cache keep the reshapes that fill them up."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=90, context_length=16, emb_dim=4 * head_dim, n_heads=4, n_layers=2)
    prepared = prepare(GPTModel(config), "int8", [[*range(16)]], progress=False)
    graph = trace(prepared.model, "decode", 20, prepared.int8_cache)
    prepared.store(graph)
    drop_reshapes(graph)
    count = Counter(node.op_type for node in graph.graph)
    assert count["Reshape"] == (1 if head_dim == 8 else 7 + 4 * config.n_layers)


def test_rows_of_a_batch_equal_single_rows(demo_bundle: Path) -> None:
    with load(demo_bundle) as gpt:
        prompts = [gpt.tokenizer.encode(text) for text in TEXTS]
        single = [gpt.generate_ids(prompt, max_new_tokens=30) for prompt in prompts]
        assert gpt.generate_ids(prompts, max_new_tokens=30) == single


def test_the_command_batch_gives_what_generate_gives(demo_bundle: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"id": i, "prompt": text}) + "\n" for i, text in enumerate(TEXTS)))
    arguments = ["batch", str(demo_bundle), str(source), str(target), "-n", "30", "--batch-size", "2"]
    gptedge.main(arguments, standalone_mode=False)
    with load(demo_bundle) as gpt:
        single = [gpt.generate(text, max_new_tokens=30) for text in TEXTS]
    assert [json.loads(line)["text"] for line in target.read_text("utf-8").splitlines()] == single
    assert all(single)


def test_weights_take_the_bytes_that_the_precision_says(demo_bundle: Path, demo_vocabulary: Vocabulary) -> None:
    """A head tied to its table is stored once; int4 keeps both at 8 bits. A scale costs a bit a weight at most."""
    model = load_checkpoint("demo")
    table = model.tok_emb.weight.numel()
    layers = sum(weight.numel() for name, weight in model.named_parameters() if weight.ndim == 2) - 2 * table
    bits = {"fp16": 16, "bf16": 16, "int8": 9, "int4": 5}[demo_bundle.name]
    expected = (layers * bits + table * max(bits, 9)) / 8
    assert (demo_bundle / "onnx" / "model.onnx_data").stat().st_size == pytest.approx(expected, rel=0.3)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_sizes_that_fill_no_block_export(precision: str, byte_vocabulary: Vocabulary, tmp_path: Path) -> None:
    torch.manual_seed(0)
    report = export_bundle(GPTModel(ODD), tmp_path / "odd", vocabulary=byte_vocabulary, precision=precision)
    assert report.worst.passed


def test_rounding_again_gives_the_same_integers(tiny_model: GPTModel) -> None:
    texts = [[*range(24)], [7, 8, 9]]
    first, second = (quantise(tiny_model, 4, texts).weights for _ in range(2))
    assert all(torch.equal(a.integers, b.integers) for a, b in zip(first, second, strict=True))


def test_rounding_leaves_the_model_as_it_was(tiny_model: GPTModel) -> None:
    before = {name: weight.clone() for name, weight in tiny_model.state_dict().items()}
    quantise(tiny_model, 8, [[*range(24)]])
    assert all(torch.equal(weight, before[name]) for name, weight in tiny_model.state_dict().items())


def test_evening_out_channels_changes_nothing_but_keys_and_values() -> None:
    """They come to fill 8 bits but for a tenth; the block's output changes by float32's rounding."""
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(vocab_size=9, context_length=32, emb_dim=48, n_heads=4, n_layers=1, qkv_bias=True))
    block: Any = model.eval().trf_blocks[0]
    x = torch.randn(1, 32, 48)
    with torch.no_grad():
        before = block(x)
        _smooth(block, [x])
        torch.testing.assert_close(block(x), before, rtol=1e-4, atol=1e-5)
        normed = block.norm1(x)
        for layer in (block.att.W_key, block.att.W_value):
            torch.testing.assert_close(layer(normed).abs().amax((0, 1)), torch.full((48,), 127 / 1.1))


def with_outliers(place: str, factor: float) -> GPTModel:
    """The demo model with one channel far larger, and what reads it as much smaller."""
    model = load_checkpoint("demo")
    model.out_head.weight = torch.nn.Parameter(model.out_head.weight.data.clone())  # apart from the token table
    blocks: list[Any] = [*model.trf_blocks]
    readers: dict[Any, list[Any]] = {}
    if place == "values":
        for block in blocks:
            block.att.W_value.weight.data[3] *= factor
            block.att.out_proj.weight.data[:, 3] /= factor
    elif place == "norms":
        readers = {block.norm1: [block.att.W_query, block.att.W_key, block.att.W_value] for block in blocks}
    else:
        readers = {model.final_norm: [model.out_head]}
    for norm, layers in readers.items():
        norm.scale.data[3] *= factor
        norm.shift.data[3] *= factor
        for layer in layers:
            layer.weight.data[:, 3] /= factor
    return model


@pytest.mark.parametrize("place", ["norms", "values"])
def test_outlier_channels_cost_nothing(place: str, demo_vocabulary: Vocabulary) -> None:
    model = with_outliers(place, 100)
    looked_at, held_out = sample_texts(demo_vocabulary, model.config, None)
    rounded, same = quantise(model, 8, looked_at), []
    with torch.no_grad(), rounded.as_computed():
        for text in held_out:
            ids = torch.tensor([text])
            same.append(model(ids).argmax(-1) == rounded.model(ids).argmax(-1))
    assert torch.cat(same, 1).float().mean() >= MIN_TOP1_AGREEMENT["int8"]


def test_a_model_that_does_not_bear_the_rounding_is_not_exported(demo_vocabulary: Vocabulary, tmp_path: Path) -> None:
    """An outlier behind the final norm takes the 8 bits of its block of inputs, which nothing evens out."""
    with pytest.raises(ParityError, match="nothing was written"):
        export_bundle(with_outliers("final norm", 1000), tmp_path / "b", vocabulary=demo_vocabulary, precision="int4")
    assert not (tmp_path / "b").exists()


def undecided(model: GPTModel) -> GPTModel:
    """The same choices, less sure of them: stories then are as a text that may go on in many ways."""
    model.out_head.weight = torch.nn.Parameter(0.3 * model.out_head.weight.data)
    return model


def test_of_a_text_that_may_go_on_in_many_ways_the_divergence_is_judged(
    demo_vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About 97 % of the choices stay, fewer than have to where a model is sure: the bound is raised above that."""
    monkeypatch.setitem(MIN_TOP1_AGREEMENT, "int4", 0.995)
    model = undecided(load_checkpoint("demo"))
    quality = export_bundle(model, tmp_path / "b", vocabulary=demo_vocabulary, precision="int4").quality
    assert quality is not None
    assert quality.judged == ["kl_nats"]
    assert quality.top1_agreement < MIN_TOP1_AGREEMENT["int4"]


def test_a_bundle_that_diverges_is_refused(demo_bundle: Path, demo_vocabulary: Vocabulary) -> None:
    """It prefers the same tokens, and is far surer of them."""
    model = undecided(load_checkpoint("demo"))
    _, held_out = sample_texts(demo_vocabulary, model.config, None)
    with pytest.raises(ParityError, match=r"diverges from the model by .* nats \(KL\) on stories, the bound is 0\."):
        measure(model, demo_bundle, demo_bundle.name, held_out[:4], "stories")


def test_rounded_inputs_are_those_of_the_kernels(demo_vocabulary: Vocabulary) -> None:
    """Parity is held with them; without them the model is further from the graphs than float32 adds up to."""
    texts, _ = sample_texts(demo_vocabulary, load_checkpoint("demo").config, None)
    prepared = prepare(load_checkpoint("demo"), "int8", texts[:4], progress=False)
    ids = torch.tensor([texts[0]])
    with torch.no_grad():
        exact = prepared.model(ids)
        with prepared.as_computed():
            rounded = prepared.model(ids)
    assert RTOL["fp32"] < float((exact - rounded).abs().max() / exact.abs().max()) < RTOL["int8"]


def test_float16_refuses_what_it_does_not_hold(byte_vocabulary: Vocabulary, tmp_path: Path) -> None:
    model = GPTModel(ODD)
    model.out_head.weight.data[0, 0] = 70000.0
    with pytest.raises(ExportError, match=r"out_head.weight exceeds 65,504"):
        export_bundle(model, tmp_path / "b", vocabulary=byte_vocabulary, precision="fp16")


def test_a_calibration_text_takes_the_place_of_the_stories(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 200, "utf-8")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(ODD.to_dict()))
    arguments = ["random", "--config", str(config), "--tokenizer", "bytes", "--precision", "int8", "--json"]
    done = CliRunner().invoke(command, [*arguments, "--calibration", str(text), "-o", str(tmp_path / "b")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["quality"]["text"] == "the calibration text"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read"), (b"\xff\xfe", "is not UTF-8 at byte 0"), (b"short", "give at least")],
)
def test_a_bad_calibration_text_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    arguments = ["demo", "--precision", "int8", "--calibration", str(text), "-o", str(tmp_path / "b")]
    error = CliRunner().invoke(command, arguments).exception
    assert isinstance(error, ExportError)
    assert message in str(error)


def test_fp32_has_nothing_to_calibrate(tiny_model: GPTModel, byte_vocabulary: Vocabulary, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="fp32 rounds nothing"):
        export_bundle(tiny_model, tmp_path / "b", vocabulary=byte_vocabulary, calibration="text")


def test_zeros_of_one_size_and_two_shapes_are_two_weights() -> None:
    """As in a model whose feed-forward was pruned away."""
    assert _digest(np.zeros((2, 8), np.float32)) != _digest(np.zeros((8, 2), np.float32))


def test_a_context_of_two_tokens_verifies(byte_vocabulary: Vocabulary, tmp_path: Path) -> None:
    """``prefill`` reads at least two, and ``decode`` the last."""
    config = GPTConfig(vocab_size=257, context_length=2, emb_dim=16, n_heads=2, n_layers=2)
    export_bundle(GPTModel(config), tmp_path / "bundle", vocabulary=byte_vocabulary, precision="int8")
    assert verify(tmp_path / "bundle").prompts
