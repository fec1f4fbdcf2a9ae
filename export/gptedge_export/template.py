"""Prompt templates: the frame of text in which an instruction model was trained to find its instruction."""

from pathlib import Path

from .errors import ExportError

PLACE = "{prompt}"
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{prompt}\n\n### Response:\n"
)
"""The one of the book's chapter 7, up to where the answer begins; an input may end the prompt as ``### Input:``."""


def load_template(source: str) -> str:
    """Return ``alpaca``'s template, or a file's text, which holds ``{prompt}`` once. Raises :class:`ExportError`."""
    if source == "alpaca":
        return ALPACA
    try:
        template = Path(source).read_bytes().decode()
    except (OSError, ValueError) as error:
        raise ExportError(
            f"template {source} cannot be read ({type(error).__name__}): give alpaca, or a UTF-8 text file"
        ) from None
    if template.count(PLACE) != 1:
        raise ExportError(f"template {source} holds {PLACE} {template.count(PLACE)} times: write it there once")
    return template
