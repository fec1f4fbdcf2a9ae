"""Texts that a command is given: as an argument, in a file, on standard input."""

import sys
from pathlib import Path

from .errors import InputError

PROMPT_MAX_BYTES = 1 << 24
"""Far above any context: where a text has no break, tiktoken takes 32 bytes for each, and no error ends that."""


def read_prompt(prompt: str | None, file: str | None) -> str:
    """Return a prompt that was given, or the one in a file or, where ``prompt`` is None or ``-``, on standard input.

    Raises :class:`InputError`.
    """
    if file is not None and prompt is not None:
        raise InputError("a PROMPT and --file are given: give one of them")
    if file is not None:
        return _to_prompt(_read_file(file, PROMPT_MAX_BYTES + 1), file)
    if prompt is None or prompt == "-":
        return _to_prompt(_read_stdin(), "standard input")
    return prompt


def read_text(file: str) -> str:
    """Return the text of a file in UTF-8, without a byte order mark. Raises :class:`InputError`."""
    return _decode(_read_file(file), file)


def _to_prompt(data: bytes, name: str) -> str:
    if len(data) > PROMPT_MAX_BYTES:
        raise InputError(f"{name} has more than {PROMPT_MAX_BYTES:,} bytes, which no model reads: shorten it")
    return _without_last_newline(_decode(data, name))


def _read_file(file: str, max_bytes: int = -1) -> bytes:
    try:
        with Path(file).open("rb") as opened:
            return opened.read(max_bytes)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}: check the path") from error


def _read_stdin() -> bytes:
    if sys.stdin is None:
        raise InputError("standard input is closed: give a PROMPT or --file")
    try:
        return sys.stdin.buffer.read(PROMPT_MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read standard input ({error.strerror}): give a PROMPT or --file") from error


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 at byte {error.start}: convert it to UTF-8") from error


def _without_last_newline(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
