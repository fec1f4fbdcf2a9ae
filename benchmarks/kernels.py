"""Why int8 has blocks of 64 and int4 of 256: kernels.py [--threads 2] [--layers 12] [--rounds 5].

ONNX Runtime's ``MatMulNBits`` over the matrices of GPT-2 124M (its head at single steps only), for several block sizes:
milliseconds of a step of 1, 2 and 8 tokens and tokens/s of a prompt of 512, medians of rounds in turns; at how many
GB/s a step of 1 reads its integers, scales and sums (onnxruntime adds a sum to each block), and those of a single
layer, which stay in the processor's cache; and whether a row's outputs have the same bits alone and among others.
Behind that, what a step of 1, 2 and 8 takes where the head of 8 bits is looked at twice, as in ``decode.onnx``.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from gptedge_export.blocks import round_to_nearest
from gptedge_export.shortlist import ROUGH_BITS, look_twice
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

D = 768
LAYER = ((3 * D, D), (D, D), (4 * D, D), (D, 4 * D))
HEAD = ((50257, D),)
CASES = [(8, 32), (8, 64), (8, 128), (8, 256), (4, 32), (4, 64), (4, 128), (4, 256)]


def graph(shapes: Sequence[tuple[int, int]], bits: int, size: int) -> onnx.ModelProto:
    """All these layers in one graph; each reads an input of its width, and the sums of its outputs are what is told."""
    random = np.random.default_rng(0)
    nodes, weights = [], []
    for i, (n, k) in enumerate(shapes):
        integers = random.integers(256, size=(n, k // size, size * bits // 8), dtype=np.uint8)
        scales = random.random((n, k // size), np.float32) / 2 ** (bits + 3)
        weights += [numpy_helper.from_array(integers, f"w{i}"), numpy_helper.from_array(scales, f"s{i}")]
        attributes = {"K": k, "N": n, "bits": bits, "block_size": size, "accuracy_level": 4}
        inputs = [f"x{k}", f"w{i}", f"s{i}"]
        nodes.append(helper.make_node("MatMulNBits", inputs, [f"y{i}"], domain="com.microsoft", **attributes))
        nodes.append(helper.make_node("ReduceL1", [f"y{i}", "last"], [f"z{i}"]))
    weights.append(numpy_helper.from_array(np.array([-1]), "last"))
    given = [
        helper.make_tensor_value_info(f"x{k}", TensorProto.FLOAT, ["m", k]) for k in sorted({k for _, k in shapes})
    ]
    told = [helper.make_tensor_value_info(f"z{i}", TensorProto.FLOAT, ["m", 1]) for i in range(len(shapes))]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph(nodes, "", given, told, weights), opset_imports=opsets, ir_version=10)


def with_head_twice(model: onnx.ModelProto) -> onnx.ModelProto:
    twice = ir.from_proto(model)
    look_twice(twice, round_to_nearest(torch.randn(HEAD[0]), ROUGH_BITS))
    return ir.to_proto(twice)


def session(model: onnx.ModelProto, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def inputs(of: Any, m: int) -> dict[str, NDArray[np.float32]]:
    rows = np.random.default_rng(1).standard_normal((m, 4 * D)).astype(np.float32)
    return {x.name: np.ascontiguousarray(rows[:, : x.shape[1]]) for x in of.get_inputs()}


def ms(of: Any, m: int) -> float:
    feeds, times, end = inputs(of, m), list[float](), time.perf_counter() + 0.1
    while time.perf_counter() < end or len(times) < 3:  # at first the threads of other sessions still wait for work
        started = time.perf_counter()
        of.run(None, feeds)
        times.append(1e3 * (time.perf_counter() - started))
    return min(times)


def gigabytes(shapes: Sequence[tuple[int, int]], bits: int, size: int) -> float:
    return sum(n * k for n, k in shapes) * (bits / 8 + 8 / size) / 1e9


def is_invariant(of: Any) -> bool:
    alone, others = inputs(of, 1), [of.run(None, inputs(of, m)) for m in (2, 3, 8)]
    first = of.run(None, alone)
    return all(np.array_equal(a[:1], b) for many in others for a, b in zip(many, first, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    opened, body, whole = {}, LAYER * options.layers, LAYER * options.layers + HEAD
    for case in CASES:
        opened[case] = [session(graph(shapes, *case), options.threads) for shapes in (whole, body, LAYER)]
    heads = {"once": opened[8, 64][0], "twice": session(with_head_twice(graph(whole, 8, 64)), options.threads)}
    head_ms: dict[str, list[list[float]]] = {name: [] for name in heads}
    found: dict[Any, list[list[float]]] = {case: [] for case in CASES}
    for _ in range(options.rounds):
        for case, (all_of_it, layers, layer) in opened.items():
            found[case].append([*(ms(all_of_it, m) for m in (1, 2, 8)), 512e3 / ms(layers, 512), ms(layer, 1)])
        for name, of in heads.items():
            head_ms[name].append([ms(of, m) for m in (1, 2, 8)])
    print(
        "| bits | block | 1 token, ms | 2 | 8 | prompt, tokens/s | GB/s | in cache | same bits alone and among others |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---|")
    for (bits, size), rows in found.items():
        one, two, eight, prompt, layer_ms = (statistics.median(column) for column in zip(*rows, strict=True))
        rates = [1e3 * gigabytes(of, bits, size) / took for of, took in ((whole, one), (LAYER, layer_ms))]
        same = "yes" if is_invariant(opened[bits, size][0]) else "no"
        print(f"| {bits} | {size} | {one:.2f} | {two:.2f} | {eight:.2f} | {prompt:,.0f}", end="")
        print(f" | {rates[0]:.0f} | {rates[1]:.0f} | {same} |")
    print("\n| head of 8 bits, blocks of 64 | 1 token, ms | 2 | 8 |\n|---|---:|---:|---:|")
    for name, rows in head_ms.items():
        print(f"| {name} | {' | '.join(f'{statistics.median(column):.2f}' for column in zip(*rows, strict=True))} |")


if __name__ == "__main__":
    main()
