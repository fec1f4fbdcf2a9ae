"""The model that benchmarks/peers.py measures, in the forms that other tools read."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

SEED = 123
CONTEXT, VOCAB = 1024, 50257
N_LAYERS, N_HEADS, HEAD_DIM = 12, 12, 64
LOOP = random.Random(1).sample(range(VOCAB), 16)
"""The model has learned one thing: after each of these ids comes the next, round and round."""
REPETITIVE = LOOP * 4
"""A prompt that the model continues by repeating it, the best case of a tool that guesses tokens by looking back."""
STEPS = 32  # whose ids are held against the book's loop
TIMED_STEPS, TEXTBOOK_STEPS = 48, 4  # of a timed decode
NEW_TOKENS = 200  # of the text that is timed with its prompt


def random_ids(length: int, seed: int = SEED) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


CHECKS = [random_ids(16, seed) for seed in range(100)]
"""Prompts whose most likely next id is held against eager PyTorch's."""


def write_model(work: Path) -> None:
    """Write the model as a Hugging Face folder, and what the book's own loop answers."""
    import torch
    from gptedge_export.hugging_face import export_hugging_face
    from gptedge_export.vocabulary import Vocabulary
    from gptedge_models import CONFIGS, GPTModel, generate_text_simple

    torch.manual_seed(SEED)
    model = GPTModel(replace(CONFIGS["gpt2-small"], qkv_bias=True)).eval()
    with torch.no_grad():
        for here, after in zip(LOOP, LOOP[1:] + LOOP[:1], strict=True):
            model.out_head.weight[after] = 0.02 * model.tok_emb.weight[here]
    letters = [bytes([byte]) for byte in range(256)]
    pairs = [left + right for left in letters for right in letters]
    vocabulary = Vocabulary((letters + pairs)[: VOCAB - 1], {"<|endoftext|>": VOCAB - 1})
    export_hugging_face(model, work / "hf", vocabulary=vocabulary)

    def answer(ids: list[int], count: int) -> list[int]:
        new: list[int] = generate_text_simple(model, torch.tensor([ids]), count, CONTEXT)[0, -count:].tolist()
        return new

    expected = {"ids": answer(random_ids(64), STEPS + 1), "next": [answer(ids, 1)[0] for ids in CHECKS]}
    (work / "expected.json").write_text(json.dumps(expected))


def write_gguf(work: Path, path: Path) -> None:
    """Write float32 GGUF; the weights of Hugging Face's GPT-2 are (in, out), GGUF's (out, in)."""
    import gguf
    from safetensors.numpy import load_file

    tensors = load_file(work / "hf" / "model.safetensors")
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(N_HEADS * HEAD_DIM)
    writer.add_feed_forward_length(4 * N_HEADS * HEAD_DIM)
    writer.add_block_count(N_LAYERS)
    writer.add_head_count(N_HEADS)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(0)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(VOCAB)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, N_LAYERS)
    for name, tensor in tensors.items():
        is_conv1d = tensor.ndim == 2 and ".h." in name
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(found, np.ascontiguousarray(tensor.T if is_conv1d else tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_plain(bundle: Path, folder: Path, bits: int) -> None:
    """Round the standard graph of a float32 bundle as ONNX Runtime's own tool does, which knows MatMul and no Gemm."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    shutil.copytree(bundle, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.onnx*"))
    model = onnx.load(bundle / "onnx" / "model.onnx")
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes, turned = [], []
    for node in model.graph.node:
        if node.op_type != "Gemm":
            nodes.append(node)
            continue
        x, weight, *bias = node.input
        array = np.ascontiguousarray(onnx.numpy_helper.to_array(weights.pop(weight)).T)  # (in, out)
        turned.append(onnx.numpy_helper.from_array(array, weight))
        product = f"{node.output[0]}.product" if bias else node.output[0]
        nodes.append(onnx.helper.make_node("MatMul", [x, weight], [product], name=product))
        if bias:
            nodes.append(onnx.helper.make_node("Add", [product, *bias], node.output))
    for old, new in ((model.graph.node, nodes), (model.graph.initializer, [*weights.values(), *turned])):
        del old[:]
        old.extend(new)
    config = DefaultWeightOnlyQuantConfig(block_size=128, is_symmetric=True, accuracy_level=4, bits=bits)
    quantizer = MatMulNBitsQuantizer(model, algo_config=config)
    quantizer.process()
    onnx.save(quantizer.model.model, folder / "onnx" / "model.onnx", save_as_external_data=True, location="plain.data")


def stateful_openvino(work: Path) -> Any:
    """Convert the model with its cache as state, in the form that OpenVINO's CPU plugin fuses: Gather, Concat, SDPA."""
    import openvino
    import torch
    import torch.nn.functional as F  # noqa: N812
    from gptedge_export.graphs import Stack, heads
    from gptedge_models import load_checkpoint
    from openvino._offline_transformations import apply_make_stateful_transformation

    class Stateful(Stack):
        def forward(self, input_ids: Any, position_ids: Any, beam_idx: Any, *past: Any) -> Any:
            present = []
            keys = torch.arange(past[0].shape[2] + input_ids.shape[1])
            allowed = keys <= position_ids[:, None, :, None]  # (B, 1, S, P+S)

            def attend(layer: int, qkv: Any) -> Any:
                q, *new = (heads(x, self.config, input_ids.shape[0]) for x in qkv.chunk(3, dim=-1))
                old = (past[2 * layer + part].index_select(0, beam_idx) for part in (0, 1))
                k, v = (torch.cat(parts, dim=2) for parts in zip(old, new, strict=True))
                present.extend([k, v])
                context = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
                return context.transpose(1, 2).flatten(2)

            x = self.tok_emb(input_ids) + self.pos_emb(position_ids)  # (1, S, D)
            for layer, block in enumerate(self.blocks):
                x = block(x, layer, attend)
            return self.out_head(self.final_norm(x[:, -1:])), *present

    module = Stateful(load_checkpoint(str(work / "hf"))).eval()
    past = [torch.zeros(1, N_HEADS, 5, HEAD_DIM)] * (2 * N_LAYERS)
    example = (torch.zeros(1, 3, dtype=torch.int64), torch.arange(5, 8)[None], torch.zeros(1, dtype=torch.int32))
    model = openvino.convert_model(module, example_input=(*example, *past))
    names = ["input_ids", "position_ids", "beam_idx", *(f"past.{i}" for i in range(2 * N_LAYERS))]
    shapes = [[1, -1], [1, -1], [1], *([[1, N_HEADS, -1, HEAD_DIM]] * (2 * N_LAYERS))]
    model.reshape(dict(zip(model.inputs, map(openvino.PartialShape, shapes), strict=True)))
    for port, name in zip(model.inputs, names, strict=True):
        port.set_names({name})
    for port, name in zip(model.outputs, ["logits", *(f"present.{i}" for i in range(2 * N_LAYERS))], strict=True):
        port.set_names({name})
    apply_make_stateful_transformation(model, {f"past.{i}": f"present.{i}" for i in range(2 * N_LAYERS)})
    empty = openvino.opset13.constant(np.zeros((1, N_HEADS, 0, HEAD_DIM), np.float32))
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([empty])
    model.validate_nodes_and_infer_types()
    return model
