"""What a checkpoint's files hold, whatever their format; and the error for what cannot be read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

MESSAGE_LENGTH = 300


class CheckpointError(ValueError):
    """A checkpoint, or the config given for it, cannot be used: one line, at most 300 characters."""

    def __init__(self, message: str) -> None:
        line = "".join(char if char.isprintable() else "?" for char in " ".join(message.split()))
        super().__init__(line if len(line) <= MESSAGE_LENGTH else line[: MESSAGE_LENGTH - 3] + "...")


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A checkpoint, or the config given for it, does not exist."""


def label(path: Path | str) -> str:
    """Return the end of a path, short enough to leave room for a message."""
    return text if len(text := str(path)) <= 80 else "..." + text[-77:]


def check_file(path: Path) -> None:
    """Raise :class:`CheckpointError` for a file that is missing, empty, or what a failed download leaves."""
    if not path.exists():
        raise CheckpointNotFoundError(f"{label(path)} does not exist: check the path")
    with path.open("rb") as file:
        head = file.read(64).lstrip().lower()
    if not head:
        raise CheckpointError(f"{label(path)} is empty: copy or download it again")
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{label(path)} is a web page, not weights: download the file itself")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{label(path)} is a Git LFS pointer, not weights: run `git lfs pull`")


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: its shape, and how to map it into memory.

    ``lasting``: the mapping may stay as long as the model; otherwise copy it and let go, so that memory holds it once.
    """

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    lasting: bool


Weights = dict[str, Stored]
