"""Run a bundle that export-onnx wrote, without PyTorch. This is the public API."""

import os

from .classify import Classification, Classifier, load_classifier
from .errors import (
    BundleError,
    BundleNotFoundError,
    GptEdgeError,
    InputError,
    OutOfMemoryError,
    ProviderError,
    TimeLimitError,
    VerificationError,
)
from .generate import Sampling
from .gpt import GPT, load
from .stream import TextStream

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # onnxruntime reads it when it is imported, which `load` does

__all__ = [
    "GPT",
    "BundleError",
    "BundleNotFoundError",
    "Classification",
    "Classifier",
    "GptEdgeError",
    "InputError",
    "OutOfMemoryError",
    "ProviderError",
    "Sampling",
    "TextStream",
    "TimeLimitError",
    "VerificationError",
    "load",
    "load_classifier",
]
