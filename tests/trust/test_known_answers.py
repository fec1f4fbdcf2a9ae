"""A bundle that was changed and signed again: its stored answers find every kind of weight, at each precision."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from gptedge_runtime import GptEdgeError, VerificationError
from gptedge_runtime.verify import verify
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from ..signing import sign

DECODE = "onnx/decode.onnx"
DATA = "onnx/model.onnx_data"
WEIGHTS = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.UINT8: np.uint8}
Array = NDArray[Any]


@pytest.fixture(params=["tiny", "int8", "int4"])
def signed(request: pytest.FixtureRequest, bundles: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bundles / str(request.param), tmp_path / "bundle")


def initializers(model: onnx.ModelProto) -> list[TensorProto]:
    """Of the graph and of the bodies in it."""
    bodies = [attribute.g for node in model.graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [tensor for graph in (model.graph, *bodies) for tensor in graph.initializer]


def weights(bundle: Path) -> Iterator[tuple[str, Array]]:
    """Each weight that decode.onnx reads, from the file of weights or from the graph."""
    for tensor in initializers(onnx.load(bundle / DECODE)):
        if tensor.data_type in WEIGHTS and tensor.dims:
            yield tensor.name, numpy_helper.to_array(tensor).copy()


def store(bundle: Path, name: str, array: Array) -> None:
    """Put a weight where decode.onnx has it; those in the file of weights are the other graphs', too."""
    model = onnx.load(bundle / DECODE, load_external_data=False)
    tensor = next(tensor for tensor in initializers(model) if tensor.name == name)
    if tensor.external_data:
        place = {entry.key: entry.value for entry in tensor.external_data}
        with (bundle / DATA).open("r+b") as file:
            file.seek(int(place["offset"]))
            file.write(array.tobytes())
    else:
        tensor.CopyFrom(numpy_helper.from_array(array, name))
        (bundle / DECODE).write_bytes(model.SerializeToString())
    sign(bundle)


def everywhere(array: Array, _: int) -> Array:
    """Every integer of 4 bits by one step, of 8 bits by 17; every other number by a half."""
    return array ^ 0x11 if array.dtype == np.uint8 else (array * 1.5 + 0.05).astype(array.dtype)


def in_few_rows(array: Array, row: int) -> Array:
    """One row in eight of a matrix, or of its integers or scales."""
    rows = slice(row % 8, None, 8)
    array[rows] = everywhere(array[rows], row)
    return array


def fault(bundle: Path) -> int:
    """The exit code of ``gptedge verify``."""
    try:
        verify(bundle)
    except GptEdgeError as error:
        return error.exit_code
    return 0


@pytest.mark.parametrize("change", [everywhere, in_few_rows])
def test_each_weight_of_a_signed_bundle_is_held_by_the_known_answers(
    signed: Path, change: Callable[[Array, int], Array]
) -> None:
    """All weights in one test, since a case takes a tenth of a second; those that pass unseen are listed together."""
    answer = json.loads((signed / "known_answers.json").read_text("utf-8"))["prompts"][-1]
    rows = {"tok_emb": answer["token_ids"][-1], "out_head": answer["logit_ids"][-1]}  # others no answer reads
    unseen, cases = [], 0
    for name, array in weights(signed):
        if change is in_few_rows and array.ndim == 1:
            continue
        store(signed, name, change(array.copy(), rows.get(name.split(".")[0], 0)))
        cases += 1
        if (code := fault(signed)) != VerificationError.exit_code:
            unseen.append((name, code))
        store(signed, name, array)
    assert fault(signed) == 0
    assert unseen == []
    assert cases >= 10
