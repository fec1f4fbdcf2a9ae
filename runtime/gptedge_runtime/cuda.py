"""decode_cuda.onnx on a GPU: caches, ids and logits stay in its memory, and a step gives back one id for each row."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from threading import Lock
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .bundle import MANIFEST, Bundle, GraphSpec, TensorSpec
from .cache import Cache, Ids, Logits
from .errors import OutOfMemoryError, ProviderError
from .limits import ShouldStop
from .ort import NOT_CAPTURED, compare_graphs, open_graph, run_error, run_options
from .session import Session, decode_contract
from .workers import Worker, run_in

T = TypeVar("T")

GRAPH = "decode_cuda"
CUDA = "CUDAExecutionProvider"
ON_HOST = "total_sequence_length"
"""The one input that CUDA's GroupQueryAttention reads in the host's memory."""

FIXED = "logit_positions"
"""The one input that a step never changes."""

HALF_ERROR = {"fp16": 1000, "bf16": 8000}
"""How much further than float32 the logits of activations of 16 bits may be from the model's: 0.02 of the largest one,
and eight times that for bfloat16, which has three bits less."""

HALF_PREFILL_TOKENS = 8192
"""Of one run of a prefill at 16 bits; a GPU reads them sooner than a CPU reads a tenth."""

_CACHE_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_BFLOAT16 = 16
"""ONNX's number of a type that NumPy lacks; on this side float16, of the same size and the same zero, stands for it."""


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
    """A session whose arrays are on the GPU, and whose decode steps are captured as CUDA graphs and replayed.

    A captured step belongs to one place in memory, and onnxruntime frees none: caches that are closed are kept for the
    next ones of their batch size. ``device`` ``cpu`` runs the same graph in the same way on the CPU, to verify it where
    there is no GPU.
    """

    graph = GRAPH
    holds_batches = False
    places_are_positions = True
    max_kept_bytes = 8 << 30
    """Of caches with captured steps. Beyond it, and where memory does not suffice, caches are as long as need be."""

    def __init__(self, bundle: Bundle, *, threads: int, timeout_s: float | None = None, device: str = "cuda") -> None:
        self.device = device
        self._cache_dtype = np.dtype(np.float32 if bundle.precision == "fp32" else np.float16)
        self._onnx_type = _BFLOAT16 if bundle.precision == "bf16" else None
        if bundle.precision in HALF_ERROR:  # at fp32 attention keeps its scores, which would take gigabytes
            self.prefill_tokens = HALF_PREFILL_TOKENS
        self._kept: dict[int, list[Cache]] = {}
        self._kept_bytes = self._n_captured = 0
        self._lock = Lock()
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
            "enable_skip_layer_norm_strict_mode": "1",  # sums in float32: of float16 the squares of outliers exceed it
            "arena_extend_strategy": "kSameAsRequested",
            "enable_cuda_graph": "1",
        }
        with quiet(self._ort):
            providers = [(CUDA, options), "CPUExecutionProvider"]
            session = on_gpu(lambda: open_graph(bundle, bundle.graphs[GRAPH], threads, providers))
        if (active := session.get_providers()[0]) != CUDA:
            raise ProviderError(f"provider cuda: onnxruntime opened the bundle on {active}: see nvidia-smi for memory")
        return session

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """Return an empty cache: one that is kept for this batch size, or a new one, which is kept if it may be."""
        with self._lock:
            kept = self._kept.setdefault(batch, [])
            if kept:
                cache = kept.pop()
                on_gpu(lambda: None)  # a step that Ctrl-C has left alone ends before
                cache.shorten(0)
                return cache
            n_bytes = batch * self.model.context_length * self._bytes_per_token
            if self._kept_bytes + n_bytes <= self.max_kept_bytes:
                with contextlib.suppress(OutOfMemoryError):
                    graph_id = self._n_captured + 1
                    key_values = self._new_key_values(batch, self.model.context_length, graph_id)
                    self._kept_bytes, self._n_captured = self._kept_bytes + n_bytes, graph_id
                    return Cache(self, key_values)
        return super().new_cache(batch, capacity)

    def take_back(self, cache: Cache) -> None:
        """Keep a cache whose step is captured for the next one of its batch size."""
        if cache.is_finite and cache.key_values[0].graph_id != NOT_CAPTURED:
            self._kept[len(cache.key_values[0])].append(cache)

    def new_key_values(self, batch: int, capacity: int) -> list[Any]:
        """Return one zeroed array (B, n_heads, capacity, cache_width) on the device for each of ``cache_names``."""
        return self._new_key_values(batch, capacity, graph_id=NOT_CAPTURED)

    def _new_key_values(self, batch: int, capacity: int, graph_id: int) -> list[Any]:
        shape = (batch, self.model.n_heads, capacity, self.model.cache_width)
        arrays = on_gpu(lambda: [self._to_device(np.zeros(shape, self._cache_dtype)) for _ in self.cache_names])
        return [replace(array, onnx_type=self._onnx_type, graph_id=graph_id) for array in arrays]

    @property
    def _bytes_per_token(self) -> int:
        return len(self.cache_names) * self.model.n_heads * self.model.cache_width * self._cache_dtype.itemsize

    def bind(self, feeds: dict[str, NDArray[Any]], key_values: Sequence[Any], logits: Logits) -> "Binding":
        """Return a binding over these arrays; what the feeds hold is copied to the device by each run."""
        return on_gpu(lambda: self._bind(feeds, key_values, logits))

    def _bind(self, feeds: dict[str, NDArray[Any]], key_values: Sequence[Any], logits: Logits) -> "Binding":
        binding = self._session.io_binding()
        graph_id = key_values[0].graph_id if feeds["input_ids"].shape[1] == 1 else NOT_CAPTURED
        # a captured step reads this number once, so it gets the largest; each row's own length is in seqlens_k
        longest = feeds[ON_HOST] if graph_id == NOT_CAPTURED else np.array(key_values[0].shape[2], np.int32)
        total = self._ort.OrtValue.ortvalue_from_numpy(longest)
        binding.bind_ortvalue_input(ON_HOST, total)
        there = {name: self._to_device(array.copy()) for name, array in feeds.items() if name != ON_HOST}
        for name, array in there.items():
            self._bind_input(binding, name, array)
        for name, array in zip(self.cache_names, key_values, strict=True):
            self._bind_input(binding, f"past_key_values.{name}", array)
            self._bind_output(binding, f"present.{name}", array)
        logits_there = self._room_for(logits)
        best_ids_there = self._room_for(np.empty(logits.shape[:2], np.int64))
        self._bind_output(binding, "logits", logits_there)
        self._bind_output(binding, "best_ids", best_ids_there)
        changing = [(feeds[name], array) for name, array in there.items() if name != FIXED]
        kept = [total, there[FIXED], *key_values]
        options = run_options(self._ort, graph_id)
        return Binding(binding, options, changing, logits, logits_there, best_ids_there, kept, graph_id)

    def run(self, binding: Any, options: Any = None) -> None:
        """Run a binding and read the most likely ids; its logits stay on the device until :meth:`read_logits`."""
        on_gpu(lambda: self._run(binding, options or binding.options))

    def run_long(self, binding: Any, should_stop: ShouldStop) -> None:
        """Run a binding that may take long: Ctrl-C ends it, and so does ``should_stop``, which raises ``Stopped``."""
        options = run_options(self._ort, binding.graph_id)
        run_in(_gpu(), lambda: self._run(binding, options), options, should_stop)

    def _run(self, binding: "Binding", options: Any) -> None:
        for here, there in binding.inputs:
            there.value.update_inplace(here)
        super().run(binding.io, options)
        binding.best_ids = binding.best_ids_there.value.numpy()
        binding.is_read = False

    def read_logits(self, binding: Any) -> None:
        """Copy the logits of the last run to the array that was bound for them, unless they are there."""
        if not binding.is_read:
            np.copyto(binding.logits, on_gpu(binding.logits_there.value.numpy))
            binding.is_read = True

    def read_best_ids(self, binding: Any) -> Ids | None:
        """Return the most likely ids of the last run, int64 (B, T); -1 where a logit is not finite."""
        ids: Ids | None = binding.best_ids
        return ids

    def _to_device(self, array: NDArray[Any]) -> "DeviceArray":
        """Return ``array`` in the device's memory, which on the CPU is its own."""
        return self._new_array(array, lambda ort_value: ort_value.ortvalue_from_numpy(array, self.device, 0))

    def _room_for(self, array: NDArray[Any]) -> "DeviceArray":
        """Return memory of the device for what ``array`` will hold, without what it holds now."""
        shape, dtype = list(array.shape), array.dtype.type
        return self._new_array(array, lambda value: value.ortvalue_from_shape_and_type(shape, dtype, self.device, 0))

    def _new_array(self, array: NDArray[Any], make: Callable[[Any], Any]) -> "DeviceArray":
        try:
            value = make(self._ort.OrtValue)
        except Exception as error:  # onnxruntime's own share no other base class
            raise run_error(error, f"the graph {GRAPH}") from error
        return DeviceArray(value, array.shape, array.dtype, value.data_ptr())

    def _bind_input(self, binding: Any, name: str, array: "DeviceArray") -> None:
        binding.bind_input(name, self.device, 0, array.element_type, list(array.shape), array.pointer)

    def _bind_output(self, binding: Any, name: str, array: "DeviceArray") -> None:
        binding.bind_output(name, self.device, 0, array.element_type, list(array.shape), array.pointer)


_first = Lock()


@cache
def _gpu_of(_process: int) -> Worker:
    return Worker()


def _gpu() -> Worker:
    """Return the one thread that uses the GPU.

    For each thread onnxruntime keeps captured steps and handles of libraries to the session's end; and while a step is
    captured, no other thread may reach for the GPU.
    """
    with _first:
        return _gpu_of(os.getpid())


def on_gpu(work: Callable[[], T]) -> T:
    """Return what ``work`` returns in the one thread that uses the GPU."""
    return _gpu().start(work).result()


@dataclass(frozen=True)
class DeviceArray:
    """An array on the device, or rows of one; ``value`` keeps the memory of all its rows.

    ``onnx_type`` is what onnxruntime takes its elements for, where that is not ``dtype``; ``graph_id`` its number of
    the step that is captured over all of it.
    """

    value: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    pointer: int
    onnx_type: int | None = None
    graph_id: int = NOT_CAPTURED

    @property
    def element_type(self) -> Any:
        """By which onnxruntime knows the type."""
        return self.dtype.type if self.onnx_type is None else self.onnx_type

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> "DeviceArray":
        start, stop, _ = rows.indices(len(self))
        row_bytes = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        shape, pointer = (stop - start, *self.shape[1:]), self.pointer + start * row_bytes
        return replace(self, shape=shape, pointer=pointer, graph_id=NOT_CAPTURED)


@dataclass
class Binding:
    """An IO binding, with arrays on this side and on the device's; ``kept`` is what else its pointers need alive."""

    io: Any
    options: Any
    inputs: list[tuple[NDArray[Any], DeviceArray]]
    logits: Logits
    logits_there: DeviceArray
    best_ids_there: DeviceArray
    kept: list[Any]
    graph_id: int
    best_ids: Ids | None = None
    is_read: bool = True
