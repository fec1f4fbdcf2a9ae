"""Where the commands start: what they are made of is loaded here, which takes longest where PyTorch is a part of it.

A Ctrl-C meanwhile, or while Python ends, ends the process as it ends any program, and not in another package's
traceback. A package that is missing is named.
"""

import signal
import sys
from importlib import import_module


def gptedge() -> None:
    """Run ``gptedge``."""
    _run("gptedge_runtime.cli", "main", needed="gptedge[cpu]")


def export_onnx() -> None:
    """Run ``export-onnx``."""
    _run("gptedge_export.cli", "main", needed="gptedge[cpu,export]")


def export_hf() -> None:
    """Run ``export-hf``."""
    _run("gptedge_export.cli", "hf_main", needed="gptedge[cpu,export]")


def _run(module: str, command: str, needed: str) -> None:
    hears = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # it may be told to ignore the signal
    if hears:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        main = getattr(import_module(module), command)
    except ModuleNotFoundError as error:
        print(f'error: {error.name} is not installed: pip install "{needed}"', file=sys.stderr)
        sys.exit(2)
    try:
        if hears:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        main()
    finally:
        if hears:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
