"""``python -m gptedge_export`` is ``export-onnx``."""

from .cli import main

main()
