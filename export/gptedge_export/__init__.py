"""Export a GPT to ONNX: PyTorch model in, verified bundle out. This is the public API."""

from .bundle import Report, export_bundle
from .classifier import Classifier
from .errors import ExportError, ParityError
from .vocabulary import Vocabulary, load_vocabulary

__all__ = ["Classifier", "ExportError", "ParityError", "Report", "Vocabulary", "export_bundle", "load_vocabulary"]
