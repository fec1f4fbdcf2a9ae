"""The device a bundle runs on: asked means got, and why CUDA cannot be had is told with its remedy."""

import contextlib
import ctypes
import io
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from . import cuda
from .bundle import Bundle
from .errors import BundleError, OutOfMemoryError, ProviderError
from .ort import import_onnxruntime
from .session import Session

_INSTALL = 'pip install "gptedge[cuda]"'
_REINSTALL = f"pip uninstall -y onnxruntime onnxruntime-gpu, then {_INSTALL}"
_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_PACKAGES = {
    "cublas": "nvidia-cublas",
    "cublasLt": "nvidia-cublas",
    "cudart": "nvidia-cuda-runtime",
    "cudnn": "nvidia-cudnn",
    "cufft": "nvidia-cufft",
    "curand": "nvidia-curand",
    "nvrtc": "nvidia-cuda-nvrtc",
}
"""The beginning of the name of the package on PyPI that brings a library; some end in the number of CUDA."""


def check_provider(name: str) -> None:
    """Raise :class:`ProviderError` for a name that stands for no device."""
    if name not in ("auto", "cpu", "cuda"):
        raise ProviderError(f"provider {name!r} is unknown: choose auto, cpu or cuda")


def choose_provider(name: str) -> str:
    """Return the device that ``auto``, ``cpu`` or ``cuda`` stands for here: ``cpu`` or ``cuda``.

    ``auto`` is ``cuda`` where onnxruntime can use a GPU. Raises :class:`ProviderError` for any other name, and where
    ``cuda`` is asked for and cannot be had.
    """
    check_provider(name)
    if name == "cpu":
        return "cpu"
    reason = why_not_cuda()
    if name == "cuda" and reason is not None:
        raise ProviderError(f"provider cuda: {reason}")
    return "cuda" if reason is None else "cpu"


def open_session(bundle: Bundle, *, provider: str, device: str, threads: int, timeout_s: float | None) -> Session:
    """Open a bundle on the ``device`` that was chosen for ``provider``; ``auto`` takes the CPU where CUDA fails.

    Raises :class:`ProviderError` where CUDA was asked for and the bundle has no graph for it, or is not what runs, and
    :class:`BundleError` where onnxruntime refuses that graph.
    """
    reason = None
    if device == "cuda":
        try:
            if cuda.GRAPH in bundle.graphs:
                return cuda.CudaSession(bundle, threads=threads, timeout_s=timeout_s)
            raise ProviderError("provider cuda: the bundle has no graph for it: export it with --cuda, or choose cpu")
        except (ProviderError, OutOfMemoryError, BundleError) as error:  # the last where kernels are missing
            if provider == "cuda":
                raise
            reason = str(error).removeprefix("provider cuda: ")
    session = Session(bundle, provider="cpu", threads=threads, timeout_s=timeout_s)
    session.why_not_cuda = reason
    return session


def why_not_cuda() -> str | None:
    """Return in one line why onnxruntime cannot use a GPU here, with the remedy; None where it can."""
    ort = import_onnxruntime()
    if cuda.CUDA not in ort.get_available_providers():
        if has_both_packages():
            return f"onnxruntime and onnxruntime-gpu are both installed, and the first hides the second: {_REINSTALL}"
        return f"the onnxruntime that is installed has no CUDA: {_REINSTALL}"
    _preload(ort)
    try:
        with cuda.quiet(ort):
            cuda.on_gpu(lambda: ort.OrtValue.ortvalue_from_shape_and_type([1], np.float32, "cuda", 0))
    except Exception:  # onnxruntime's own share no other base class, and its text is one of C++
        return _missing(ort)
    return None


def has_both_packages() -> bool:
    """Whether two packages are installed that bring the same module: which one is there, the last installed decides."""
    return _is_installed("onnxruntime") and _is_installed("onnxruntime-gpu")


def offers_cuda() -> bool:
    """Whether the user has installed what could use a GPU, so that a run on the CPU needs a word."""
    return _is_installed("onnxruntime-gpu")


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _preload(ort: Any) -> None:
    """Load NVIDIA's libraries from the packages of this Python, where they are; what is missing shows later."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
        ort.preload_dlls()


def _missing(ort: Any) -> str:
    """What stands against CUDA, after onnxruntime has tried to load it in vain."""
    missing = []
    name = _missing_library(Path(ort.__file__).parent / "capi")
    if name is not None and not name.startswith(_DRIVER):
        stem = re.sub(r"^lib|\W.*$|64_.*$", "", name)
        missing.append(f"{name} of {_PACKAGES.get(stem, 'CUDA')} is missing: {_INSTALL}")
    if not _can_load(_DRIVER):
        missing.append("NVIDIA's driver is missing: install it, or choose provider cpu")
    return "; ".join(missing) or "onnxruntime finds no GPU that it can use: see nvidia-smi, or choose provider cpu"


def _missing_library(folder: Path) -> str | None:
    """Return the first library that onnxruntime's CUDA needs and the system's loader does not find."""
    for path in folder.glob("*onnxruntime_providers_cuda.*"):
        try:
            ctypes.CDLL(str(path))
        except OSError as error:  # on Linux: "libcublas.so.13: cannot open shared object file: No such ..."
            name = re.match(r"(lib[\w-]+\.so[.\d]*): cannot open", str(error))
            return name[1] if name else "a library"
    return None


def _can_load(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
