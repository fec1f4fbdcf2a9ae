"""decode_cuda.onnx on a GPU: caches, ids and logits stay in its memory, and a step gives back one id for each row."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import MANIFEST, Bundle, GraphSpec, TensorSpec
from .errors import ProviderError
from .ort import compare_graphs, open_graph, run_error, run_options
from .session import Ids, Logits, Session, cache_width, decode_contract

GRAPH = "decode_cuda"
CUDA = "CUDAExecutionProvider"
ON_HOST = "total_sequence_length"
"""The one input that CUDA's GroupQueryAttention reads in the host's memory."""

FIXED = "logit_positions"
"""The one input that a step never changes."""

FP16_ERROR = 1000
"""How much further than float32 the logits of float16 activations may be from the model's: 0.02 of the largest one."""

_CACHE_DTYPES: dict[str, np.dtype[Any]] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}


def contract(bundle: Bundle) -> GraphSpec:
    """Return the inputs and outputs that decode_cuda.onnx must have: decode.onnx's, with ids beside the logits."""
    plain = decode_contract(bundle.model, str(_CACHE_DTYPES.get(bundle.precision)))
    best_ids = TensorSpec("best_ids", "int64", ("batch_size", "logit_count"))
    return replace(plain, outputs=(*plain.outputs, best_ids))


@contextlib.contextmanager
def quiet(ort: Any) -> Iterator[None]:
    """Keep onnxruntime's own log off stderr while it reaches for a GPU: what is wrong is told in one line of ours."""
    ort.set_default_logger_severity(4)
    try:
        yield
    finally:
        ort.set_default_logger_severity(2)  # as it is by default


class CudaSession(Session):
    """A session whose arrays are on the GPU.

    ``device`` ``cpu`` runs the same graph in the same way on the CPU, to verify it where there is no GPU. ``capture``
    replays each decode step as one CUDA graph; a captured step holds its memory as long as the session lives, so it is
    for programs that decode with one cache.
    """

    graph = GRAPH
    holds_batches = False
    places_are_positions = True

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int,
        timeout_s: float | None = None,
        device: str = "cuda",
        capture: bool = False,
    ) -> None:
        self.device, self.capture = device, capture
        self._cache_dtype = _CACHE_DTYPES.get(bundle.precision, np.dtype(np.float32))
        self._graph_ids = itertools.count(1)
        super().__init__(bundle, provider=device, threads=threads, timeout_s=timeout_s)
        self.rounds_finely = False  # no bound says where a GPU's last bits turn a choice: no drafts

    def _open(self, bundle: Bundle, threads: int, exact: bool) -> Any:
        where = f"{MANIFEST}: {bundle.graphs[GRAPH].path}"
        compare_graphs(where, bundle.graphs[GRAPH], contract(bundle))
        if self.device == "cpu":
            return open_graph(bundle, bundle.graphs[GRAPH], threads)
        options = {
            "device_id": "0",
            "use_tf32": "0",  # float32 means float32
            "arena_extend_strategy": "kSameAsRequested",
            "enable_cuda_graph": str(int(self.capture)),
        }
        with quiet(self._ort):
            session = open_graph(bundle, bundle.graphs[GRAPH], threads, [(CUDA, options), "CPUExecutionProvider"])
        if (active := session.get_providers()[0]) != CUDA:
            raise ProviderError(f"provider cuda: onnxruntime opened the bundle on {active}: see nvidia-smi for memory")
        return session

    def new_key_values(self, batch: int, capacity: int) -> list[Any]:
        """Return one zeroed array (B, n_heads, capacity, cache_width) on the device for each of ``cache_names``."""
        shape = (batch, self.model.n_heads, capacity, cache_width(self.model))
        return [self._to_device(np.zeros(shape, self._cache_dtype)) for _ in self.cache_names]

    def bind(self, feeds: dict[str, NDArray[Any]], key_values: Sequence[Any], logits: Logits) -> "Binding":
        """Return a binding over these arrays; what the feeds hold is copied to the device by each run."""
        binding, graph_id = self._session.io_binding(), self._next_graph_id(feeds)
        # a captured step reads this number once, so it gets the largest; each row's own length is in seqlens_k
        longest = np.array(key_values[0].shape[2], np.int32) if graph_id > 0 else feeds[ON_HOST]
        total = self._ort.OrtValue.ortvalue_from_numpy(longest)
        binding.bind_ortvalue_input(ON_HOST, total)
        there = {name: self._to_device(array.copy()) for name, array in feeds.items() if name != ON_HOST}
        for name, array in there.items():
            self._bind_input(binding, name, array)
        for name, array in zip(self.cache_names, key_values, strict=True):
            self._bind_input(binding, f"past_key_values.{name}", array)
            self._bind_output(binding, f"present.{name}", array)
        logits_there = self._to_device(np.empty_like(logits))
        best_ids = self._to_device(np.zeros(logits.shape[:2], np.int64))
        self._bind_output(binding, "logits", logits_there)
        self._bind_output(binding, "best_ids", best_ids)
        changing = [(feeds[name], array) for name, array in there.items() if name != FIXED]
        kept = [total, there[FIXED], *key_values]
        return Binding(binding, changing, logits, logits_there, best_ids, kept, graph_id)

    def run(self, binding: Any, options: Any = None) -> None:
        """Run a binding; its logits stay on the device until :meth:`read_logits`."""
        for here, there in binding.inputs:
            there.value.update_inplace(here)
        if self.capture:
            options = options or run_options(self._ort)
            options.add_run_config_entry("gpu_graph_id", str(binding.graph_id))
        super().run(binding.io, options)
        binding.is_read = False

    def read_logits(self, binding: Any) -> None:
        """Copy the logits of the last run to the array that was bound for them, unless they are there."""
        if not binding.is_read:
            np.copyto(binding.logits, binding.logits_there.value.numpy())
            binding.is_read = True

    def read_best_ids(self, binding: Any) -> Ids | None:
        """Return the most likely ids of the last run, int64 (B, T); -1 where a logit is not finite."""
        ids: Ids = binding.best_ids.value.numpy()
        return ids

    def _next_graph_id(self, feeds: dict[str, NDArray[Any]]) -> int:
        """Only a step of one token comes again in the same shape and place: -1 captures nothing."""
        return next(self._graph_ids) if self.capture and feeds["input_ids"].shape[1] == 1 else -1

    def _to_device(self, array: NDArray[Any]) -> "DeviceArray":
        try:
            value = self._ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)
        except Exception as error:  # onnxruntime's own share no other base class
            raise run_error(error, f"the graph {GRAPH}") from error
        return DeviceArray(value, array.shape, array.dtype, value.data_ptr())

    def _bind_input(self, binding: Any, name: str, array: "DeviceArray") -> None:
        binding.bind_input(name, self.device, 0, array.dtype.type, list(array.shape), array.pointer)

    def _bind_output(self, binding: Any, name: str, array: "DeviceArray") -> None:
        binding.bind_output(name, self.device, 0, array.dtype.type, list(array.shape), array.pointer)


@dataclass(frozen=True)
class DeviceArray:
    """An array on the device, or rows of one; ``value`` keeps the memory of all its rows."""

    value: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    pointer: int

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> "DeviceArray":
        start, stop, _ = rows.indices(len(self))
        row_bytes = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        return DeviceArray(self.value, (stop - start, *self.shape[1:]), self.dtype, self.pointer + start * row_bytes)


@dataclass
class Binding:
    """An IO binding, with arrays on this side and on the device's; ``kept`` is what else its pointers need alive."""

    io: Any
    inputs: list[tuple[NDArray[Any], DeviceArray]]
    logits: Logits
    logits_there: DeviceArray
    best_ids: DeviceArray
    kept: list[Any]
    graph_id: int
    is_read: bool = True
