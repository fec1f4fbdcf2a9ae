"""Export a GPT to ONNX: PyTorch model in, verified bundle out. This is the public API."""

from .bundle import Report, export_bundle
from .errors import ExportError
from .vocabulary import Vocabulary, load_vocabulary

__all__ = ["ExportError", "Report", "Vocabulary", "export_bundle", "load_vocabulary"]
