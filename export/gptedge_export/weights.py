"""One weights file for several graphs: a tensor that occurs twice is stored once."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

INLINE_BYTES = 1024
"""Smaller tensors stay inside the graph."""


def save(graphs: Mapping[str, ir.Model], folder: Path) -> None:
    """Write each graph as ``folder/NAME.onnx`` and their weights, once, as ``folder/model.onnx_data``.

    Tensors are streamed one at a time, so that memory holds no second copy of the weights.
    """
    places: dict[bytes, int] = {}
    with (folder / "model.onnx_data").open("wb") as file:
        for part in (part for graph in graphs.values() for part in graph.graphs()):
            for value in part.initializers.values():
                if value.const_value is not None and value.const_value.nbytes > INLINE_BYTES:
                    value.const_value = _move(value.const_value, file, places, folder)
    for name, graph in graphs.items():
        ir.save(graph, folder / f"{name}.onnx")


def _move(tensor: ir.TensorProtocol, file: BinaryIO, places: dict[bytes, int], folder: Path) -> ir.ExternalTensor:
    """Store the tensor's bytes unless they are there already; return the reference to them."""
    data = tensor.tobytes()
    digest = hashlib.sha256(data).digest()
    if digest not in places:
        align = 65536 if len(data) >= 1 << 20 else 64  # large tensors are mapped, and Windows maps at 64 KiB
        file.write(bytes(-file.tell() % align))
        places[digest] = file.tell()
        file.write(data)
    return ir.ExternalTensor(
        "model.onnx_data",
        places[digest],
        len(data),
        tensor.dtype,
        shape=ir.Shape(tensor.numpy().shape),
        name=tensor.name or "",
        base_dir=folder,
    )
