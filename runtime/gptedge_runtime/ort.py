"""onnxruntime: graphs opened and held against the manifest, the options of a run, and its errors in our words."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle, GraphSpec, TensorSpec
from .errors import BundleError, GptEdgeError, OutOfMemoryError, ProviderError
from .mapped import opening
from .workers import no_thread

_NO_TILES = "ORT_GQA_DISABLE_FLASH_ATTENTION"
NOT_CAPTURED = -1
_SPIN_US = 1000  # that a thread waits for work and keeps its core from another graph's threads; usual: far longer
_SILENT = 4  # only fatal errors are logged; the others arrive as exceptions
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int8)": "int8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
}


def import_onnxruntime() -> Any:
    """Return onnxruntime; it is imported late, so that help and usage errors need not wait for it."""
    os.environ.pop("ORT_LOAD_CONFIG_FROM_MODEL", None)  # a model file must not bring its own session options
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ProviderError('onnxruntime is not installed: pip install "gptedge[cpu]"') from error
    except ImportError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # Ctrl-C came while its library was loaded
            raise error.__cause__ from None
        raise ProviderError("onnxruntime does not load: python -c 'import onnxruntime' says why") from error
    return onnxruntime


def run_options(ort: Any, graph_id: int = NOT_CAPTURED) -> Any:
    """Return the options of one run, by which it can be ended; ``graph_id`` numbers the CUDA graph that it is."""
    options = ort.RunOptions()
    options.log_severity_level = _SILENT
    options.add_run_config_entry("gpu_graph_id", str(graph_id))  # onnxruntime asks each time, and long over no answer
    return options


def run_error(error: Exception, graph: str) -> GptEdgeError:
    """Return what to say about an exception of onnxruntime; its own text may hold paths and many lines."""
    if _is_about_memory(error):
        return out_of_memory()
    return BundleError(f"onnxruntime cannot run {graph} ({type(error).__name__}): export the bundle again")


def _is_about_memory(error: Exception) -> bool:
    """onnxruntime has no type for it; its texts hold one of these."""
    return any(
        sign in str(error) for sign in ("bad_alloc", "bad allocation", "Failed to allocate memory", "out of memory")
    )


def empty(*shape: int) -> NDArray[np.float32]:
    """Return an array to write to. Raises :class:`OutOfMemoryError`."""
    try:
        return np.empty(shape, np.float32)
    except MemoryError as error:
        raise out_of_memory() from error


def out_of_memory() -> OutOfMemoryError:
    """Return what to say where memory ran out."""
    return OutOfMemoryError("out of memory: end other programs, or take a smaller bundle, prompt or batch")


def open_graph(
    bundle: Bundle,
    graph: GraphSpec,
    threads: int,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
    *,
    packed: bool = True,
    optimised: bool = True,
) -> Any:
    """Return an onnxruntime session over the verified bytes of a graph whose tensors are those of the manifest.

    Unless ``packed`` its kernels read the weights as they lie in the file; ``MatMulNBits`` then multiplies in float32
    and rounds no input. A graph that gains nothing by it opens sooner if it is not ``optimised``.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _SILENT
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_mem_pattern = False  # it would plan memory for each length anew, and keep all that it planned
        options.enable_mem_reuse = False  # it keeps what one layer frees for the next, of each size
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED  # usual: all of the past first
    if not packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    weights_folder = str((bundle.folder / graph.path).parent)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", weights_folder)
    data = bundle.read(graph.path)
    try:
        with attention_of_cache(any(tensor.dtype == "int8" for tensor in graph.inputs)):
            session = ort.InferenceSession(data, options, providers=list(providers), enable_fallback=False)
    except Exception as error:  # onnxruntime's own share no other base class
        if _is_about_memory(error):
            raise out_of_memory() from error
        if "pthread_create" in str(error):
            raise no_thread() from error
        cause = type(error).__name__
        raise BundleError(
            f"onnxruntime {ort.__version__} refuses {graph.path} ({cause}): update it or export again"
        ) from error
    if not bundle.is_in_place():
        raise BundleError(f"the bundle {bundle.folder} was replaced while it was opened: open it again")
    found = GraphSpec(graph.path, _read_tensors(session.get_inputs()), _read_tensors(session.get_outputs()))
    compare_graphs(graph.path, found, graph)
    return session


@contextmanager
def attention_of_cache(has_8_bits: bool) -> Iterator[None]:
    """Sessions made herein attend to a cache of 8 bits without onnxruntime's tiles, and to others with them.

    Tiles make it slower there, and faster elsewhere (docs/performance.md). The environment, which is where onnxruntime
    looks as it makes a session, is afterwards as it was.
    """
    with opening:
        before = os.environ.get(_NO_TILES)
        os.environ[_NO_TILES] = str(int(has_8_bits))
        try:
            yield
        finally:
            if before is None:
                del os.environ[_NO_TILES]
            else:
                os.environ[_NO_TILES] = before


def _read_tensors(arguments: Sequence[Any]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(a.name, _DTYPES.get(a.type, a.type), tuple(a.shape)) for a in arguments)


def compare_graphs(where: str, found: GraphSpec, wanted: GraphSpec) -> None:
    """Refuse a graph whose inputs and outputs differ by name, dtype or shape; their order is free."""
    have, want = _by_name(found), _by_name(wanted)
    for name in sorted(have | want):
        if have.get(name) != want.get(name):
            raise BundleError(
                f"{where}: {name} is {have.get(name, 'missing')}, not {want.get(name, 'expected')}: "
                "export the bundle again"
            )


def _by_name(graph: GraphSpec) -> dict[str, str]:
    inputs = {f"input {tensor.name}": f"{tensor.dtype} {list(tensor.shape)}" for tensor in graph.inputs}
    return inputs | {f"output {tensor.name}": f"{tensor.dtype} {list(tensor.shape)}" for tensor in graph.outputs}
