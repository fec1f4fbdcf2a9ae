"""prefill.onnx in onnxruntime: how an int8 or int4 bundle reads long prompts, faster than decode.onnx does."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import MANIFEST, Bundle, GraphSpec, ModelConfig, TensorSpec
from .limits import ShouldStop
from .mapped import let_go, newly_mapped
from .ort import compare_graphs, import_onnxruntime, open_graph, run_error, run_options
from .workers import in_worker

GRAPH = "prefill"
MIN_TOKENS = {"int8": 96, "int4": 256}
"""Of a prompt that is read with it, by precision; shorter ones gain less than opening the graph takes, and turning
weights of 4 bits into ones of 8."""
ACTIVATION_MAX = 127  # to which the graph rounds inputs of layers; it takes 63 where more than that is not exact
PART_TOKENS = 768
"""Of one run at most: each reads all weights from the file, and attention holds numbers for each two tokens."""


def contract(model: ModelConfig) -> GraphSpec:
    """Return the inputs and outputs that prefill.onnx must have for a model of these sizes."""

    def cache(prefix: str, length: str) -> list[TensorSpec]:
        shape = (1, model.n_heads, length, model.cache_width)
        return [TensorSpec(f"{prefix}.{name}", "int8", shape) for name in model.cache_names]

    inputs = [TensorSpec("input_ids", "int64", (1, "sequence_length"))]
    inputs += [*cache("past_key_values", "past_sequence_length"), TensorSpec("activation_max", "float32", ())]
    outputs = [*cache("present", "sequence_length"), TensorSpec("is_exact", "int32", ())]
    return GraphSpec("", tuple(inputs), tuple(outputs))


class Prefill:
    """The graph, checked against the manifest; its weights stay those of the mapped file."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        graph = bundle.graphs[GRAPH]
        compare_graphs(f"{MANIFEST}: {graph.path}", graph, contract(bundle.model))
        self._ort = import_onnxruntime()
        self._names = bundle.model.cache_names
        with newly_mapped(bundle.folder) as self._weights:
            self._session = open_graph(bundle, graph, threads, packed=False, optimised=False)

    def read(self, token_ids: Sequence[int], key_values: Sequence[NDArray[Any]], should_stop: ShouldStop) -> None:
        """Write keys and values of these ids to the beginning of (1, n_heads, capacity, width). Raises ``Stopped``."""

        def stop() -> bool:
            let_go(self._weights)  # what layers have read: memory need not hold it until the next part
            return should_stop()

        end, n_parts = 0, -(-len(token_ids) // PART_TOKENS)
        for ids in np.array_split(np.array(token_ids, np.int64), n_parts):
            begin, end = end, end + len(ids)
            self._read_part(ids, [(buffer[:, :, :begin], buffer[:, :, begin:end]) for buffer in key_values], stop)
        let_go(self._weights)

    def _read_part(
        self,
        ids: NDArray[np.int64],
        key_values: Sequence[tuple[NDArray[Any], NDArray[Any]]],
        should_stop: ShouldStop,
    ) -> None:
        """Write keys and values of ids (S,) into the second of each pair, behind those that the first holds."""
        pairs = [(np.ascontiguousarray(past), np.empty_like(new, order="C")) for past, new in key_values]
        feeds = {"input_ids": ids[None], "activation_max": np.array(ACTIVATION_MAX, np.float32)}
        binding, options = self._session.io_binding(), run_options(self._ort)
        binding.arrays = [feeds, pairs]  # until 1.29 onnxruntime does not hold them
        for name, (past, new) in zip(self._names, pairs, strict=True):
            feeds[f"past_key_values.{name}"] = past
            binding.bind_ortvalue_output(f"present.{name}", self._ort.OrtValue.ortvalue_from_numpy(new))
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, self._ort.OrtValue.ortvalue_from_numpy(array))

        def run() -> None:
            try:
                self._session.run_with_iobinding(binding, options)
            except Exception as error:  # onnxruntime's own share no other base class
                raise run_error(error, f"the graph {GRAPH}") from error

        in_worker(run, options, should_stop)
        for (_, place), (_, new) in zip(key_values, pairs, strict=True):
            place[:] = new
