"""Feed the readers of a bundle anything: a documented error or a value, never more.

    pip install atheris
    python tests/fuzz/readers.py CORPUS -max_total_time=3600

CORPUS is a folder to keep interesting inputs in. The first byte of an input chooses the reader.
"""

import contextlib
import importlib
import sys
from pathlib import Path

from gptedge_runtime.bundle import TokenizerSpec, _parse_manifest
from gptedge_runtime.errors import GptEdgeError
from gptedge_runtime.strict_json import parse_json
from gptedge_runtime.tokenizer import Tokenizer, parse_ranks

BYTES = [bytes([byte]) for byte in range(256)]


def read_manifest(data: bytes) -> None:
    """Any bytes as manifest.json."""
    _parse_manifest(Path("bundle"), parse_json(data, "manifest.json"))


def read_ranks(data: bytes) -> None:
    """Any bytes as tokenizer.tiktoken."""
    assert len(parse_ranks(data, "tokenizer.tiktoken")) >= 256


def read_pattern(data: bytes) -> None:
    """Any text as the tokenizer's pattern, used on any text: all of it comes back."""
    pattern, _, text = data.decode(errors="replace").partition("\n")
    tokenizer = Tokenizer(TokenizerSpec("tokenizer.tiktoken", pattern[:200], {}, None), BYTES, 256)
    assert tokenizer.decode(tokenizer.encode(text)) == text


READERS = (read_manifest, read_ranks, read_pattern)


def read(data: bytes) -> None:
    """Feed one input to the reader that its first byte names."""
    if data:
        with contextlib.suppress(GptEdgeError):
            READERS[data[0] % len(READERS)](data[1:])


if __name__ == "__main__":
    atheris = importlib.import_module("atheris")
    atheris.instrument_all()
    atheris.Setup(sys.argv, read)
    atheris.Fuzz()
