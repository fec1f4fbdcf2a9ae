"""Errors of the exporter; all belong to the family of the runtime."""

from gptedge_runtime.errors import GptEdgeError, VerificationError


class ExportError(GptEdgeError, ValueError):
    """The model, the tokenizer or the place to write to cannot be used; the user can mend it."""


class ParityError(VerificationError):
    """A graph does not compute what its model computes; nothing was written."""
