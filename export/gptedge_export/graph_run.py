"""One ONNX graph of a bundle, run with the plainest calls there are, to be held against the model."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from gptedge_models import GPTConfig
from gptedge_runtime.ort import attention_of_cache, import_onnxruntime
from numpy.typing import NDArray
from onnx_ir.passes.common import NameFixPass

from .errors import ParityError
from .graphs import IN_PLACE, cache_names, cache_width
from .precision import BITS

Array = NDArray[Any]

WIDENED = ("decode_cuda", "bf16")
"""ONNX Runtime's CPU has no kernels for bfloat16: this graph is held with float32 in its place."""


class Graph:
    """One ONNX graph under verification, run with the plainest calls there are.

    Without arena, and at fp32 prepacking, it opens in milliseconds and maps the weights, so that it lives for one
    comparison and no two graphs' weights count at once.
    """

    def __init__(self, folder: Path, name: str, config: GPTConfig, precision: str = "fp32") -> None:
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.enable_cpu_mem_arena = False
        if precision not in BITS:  # the kernels for integers compute otherwise without it
            options.add_session_config_entry("session.disable_prepacking", "1")
        self.name = name
        self.config = config
        narrow = {("decode", "int8"): np.int8, ("decode", "int4"): np.int8, ("decode_cuda", "fp16"): np.float16}
        self._cache_dtype = narrow.get((name, precision), np.float32)
        path = folder / "onnx" / f"{name}.onnx"
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        data = widened(path) if (name, precision) == WIDENED else path.read_bytes()
        with attention_of_cache(self._cache_dtype == np.int8):
            self._session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(self, **feeds: Array) -> list[Array]:
        """Logits, then the cache."""
        return list(self._session.run(None, feeds))

    def cache(self, batch_size: int, length: int) -> list[Array]:
        """A cache to begin with: buffers of that length for the graphs that work in place, nothing for ``model``."""
        length = length if self.name in IN_PLACE else 0
        shape = (batch_size, self.config.n_heads, length, cache_width(self.name, self.config))
        return [np.zeros(shape, self._cache_dtype) for _ in cache_names("", self.config)]

    def read(self, ids: Array, past: int, buffers: list[Array], activation_max: int) -> bool:
        """Write keys and values of ids (1, S) behind ``past`` tokens; whether 127 would be exact on this machine."""
        names = cache_names("past_key_values", self.config)
        before = {name: buffer[:, :, :past].copy() for name, buffer in zip(names, buffers, strict=True)}
        *present, is_exact = self.run(input_ids=ids, activation_max=np.array(activation_max, np.float32), **before)
        for buffer, array in zip(buffers, present, strict=True):
            buffer[:, :, past : past + ids.shape[1]] = array
        return bool(is_exact)

    def prefill(self, ids: Array) -> Array:
        """Logits (B, T, V) of ids (B, T)."""
        return self.step(ids, 0, self.cache(*ids.shape))[0]

    def step(self, ids: Array, past: int, cache: list[Array], mask: Array | None = None) -> tuple[Array, list[Array]]:
        """Read ids (B, S) after ``past`` tokens: logits (B, S, V) and the new cache. ``mask`` is for ``model``."""
        batch, new = ids.shape
        if self.name in IN_PLACE:
            positions = np.tile(np.arange(past, past + new), (batch, 1))
            wanted = np.tile(np.arange(new), (batch, 1))
            return self.decode(ids, positions, np.full(batch, past + new), wanted, cache)
        mask = np.ones((batch, past + new), np.int64) if mask is None else mask
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, past:]
        return self._cached(cache, input_ids=ids, attention_mask=mask, position_ids=positions)

    def decode(
        self, ids: Array, positions: Array, totals: Array, wanted: Array, cache: list[Array]
    ) -> tuple[Array, list[Array]]:
        """One step of ``decode`` after which row b holds ``totals[b]`` tokens; logits of the positions ``wanted``."""
        return self._cached(
            cache,
            input_ids=ids,
            position_ids=positions.astype(np.int64),
            seqlens_k=(totals - 1).astype(np.int32),
            total_sequence_length=np.array(totals.max(), np.int32),
            logit_positions=wanted.astype(np.int64),
        )

    def _cached(self, cache: list[Array], **feeds: Array) -> tuple[Array, list[Array]]:
        past = dict(zip(cache_names("past_key_values", self.config), cache, strict=True))
        logits, *present = self.run(**feeds, **past)
        if self.name == "decode_cuda" and not np.array_equal(present.pop(0), logits.argmax(-1)):
            raise ParityError("decode_cuda.onnx: best_ids are not those of its logits: nothing was written")
        return logits, present


def widened(path: Path) -> bytes:
    """Return a graph with float32 in the place of bfloat16; its weights stay where they are, and are cast."""
    model = ir.load(path)
    graph = model.graph
    for value in [*graph.inputs, *graph.outputs]:
        if value.dtype == ir.DataType.BFLOAT16:
            value.dtype = ir.DataType.FLOAT
    for node in graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.BFLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
    for value in graph.initializers.values():
        if value.dtype == ir.DataType.BFLOAT16:
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
            value.replace_all_uses_with(cast.outputs[0])
            cast.replace_input_with(0, value)
            graph.insert_before(graph[0], cast)
    NameFixPass()(model)
    data: bytes = ir.to_proto(model).SerializeToString()
    return data
