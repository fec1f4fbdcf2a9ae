"""Files of weights: what tensors they hold, each read when it is asked for; and the error for what cannot be read."""

import pickle
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
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


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: its shape, and how to map it into memory.

    ``lasting``: the mapping may stay as long as the model; otherwise copy it and let go, so that memory holds it once.
    """

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    lasting: bool


Weights = dict[str, Stored]


def open_weights(path: Path) -> Weights:
    """List the tensors of a ``.pth``, ``.pt`` or ``.safetensors`` file, or of a folder with ``model.safetensors``.

    Nothing is read yet. Raises :class:`CheckpointError`.
    """
    weights: Weights = {}
    try:
        for file in _files(path):
            weights |= _OPENERS[file.suffix](file)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{label(path)} cannot be read: {error.strerror or type(error).__name__}") from None
    if not weights:
        raise CheckpointError(f"{label(path)} holds no tensors: save model.state_dict() again")
    return _without_prefix(weights)


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise CheckpointNotFoundError(f"{label(path)} does not exist: check the path")
    if path.is_dir():
        return _files_of_folder(path)
    if path.suffix not in _OPENERS or not path.is_file():
        raise CheckpointError(f"{label(path)} is no checkpoint: give a {', '.join(_OPENERS)} file or a folder")
    with path.open("rb") as file:
        head = file.read(64).lstrip().lower()
    if not head:
        raise CheckpointError(f"{label(path)} is empty: copy or download it again")
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{label(path)} is a web page, not weights: download the file itself")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{label(path)} is a Git LFS pointer, not weights: run `git lfs pull`")
    return [path]


def _files_of_folder(folder: Path) -> list[Path]:
    whole = folder / "model.safetensors"
    files = [whole] if whole.exists() else sorted(folder.glob("model-*-of-*.safetensors"))
    if files:
        return [file for name in files for file in _files(name)]
    if others := sorted(file.name for file in folder.iterdir() if file.suffix in _OPENERS):
        raise CheckpointNotFoundError(f"{label(folder)} holds no model.safetensors: give the file {others[0]} itself")
    raise CheckpointNotFoundError(f"{label(folder)} holds no model.safetensors: save the model there as safetensors")


def _open_torch(path: Path) -> Weights:
    loaded = _load_torch(path)
    state = loaded.get("model_state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict):
        raise CheckpointError(f"{label(path)} holds a {type(state).__name__}: save model.state_dict() instead")
    weights = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            what = f"{name!r:.40} of type {type(tensor).__name__}"
            raise CheckpointError(f"{label(path)} holds {what} among its tensors: save model.state_dict() alone")
        weights[name] = Stored(tuple(tensor.shape), tensor.detach, lasting=True)
    return weights


def _load_torch(path: Path) -> Any:
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\3\4"  # what torch.save has written since 1.6, and what can be mapped
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{label(path)} holds {code[1]:.60}, which could run code when loaded, and is refused: "
                "save model.state_dict() alone"
            ) from None
        cause = "holds more than tensors, or is no PyTorch file"
    except Exception:  # damaged bytes raise almost any type, with messages about C++ and zip files
        cause = "is damaged, cut short, or is no PyTorch file"
    raise CheckpointError(f"{label(path)} {cause}: copy it again, or save model.state_dict() with torch.save")


def _open_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            shapes = [tuple(file.get_slice(name).get_shape()) for name in names]
    except SafetensorError:
        raise CheckpointError(f"{label(path)} is cut short or no safetensors file: copy or download it again") from None
    return {name: Stored(shape, _reader(path, name), lasting=False) for name, shape in zip(names, shapes, strict=True)}


def _reader(path: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with safe_open(path, framework="pt") as file:  # opened anew: each tensor then has a mapping of its own
            try:
                tensor: Tensor = file.get_tensor(name)
            except SafetensorError:
                raise CheckpointError(f"{label(path)}: {name:.100} is no float32: save the model as float32") from None
        return tensor

    return read


def _without_prefix(weights: Weights) -> Weights:
    """Strip what ``torch.compile`` and ``DistributedDataParallel`` put before every name."""
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): stored for name, stored in weights.items()}
    return weights


_OPENERS: dict[str, Callable[[Path], Weights]] = {
    ".pth": _open_torch,
    ".pt": _open_torch,
    ".safetensors": _open_safetensors,
}
