"""Safetensors files, and the index that tells which of several files holds which tensor."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .weights import CheckpointError, Stored, Weights, check_file, label


def open_safetensors(path: Path) -> Weights:
    """List the tensors of a ``.safetensors`` file, under all their names. Raises :class:`CheckpointError`."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            shapes = [tuple(file.get_slice(name).get_shape()) for name in names]
            aliases = file.metadata() or {}
    except SafetensorError:
        raise CheckpointError(f"{label(path)} is cut short or no safetensors file: copy or download it again") from None
    weights = {
        name: Stored(shape, _reader(path, name), lasting=False) for name, shape in zip(names, shapes, strict=True)
    }
    # of a tensor with two names save_model stores one, and notes the other: {"tok_emb.weight": "out_head.weight"}
    return {alias: weights[name] for alias, name in aliases.items() if name in weights} | weights


def _reader(path: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with safe_open(path, framework="pt") as file:  # opened anew: each tensor then has a mapping of its own
            try:
                tensor: Tensor = file.get_tensor(name)
            except SafetensorError:
                raise CheckpointError(f"{label(path)}: {name:.100} is no float32: save the model as float32") from None
        return tensor

    return read


def open_index(path: Path) -> Weights:
    """List the tensors of the files that a ``model.safetensors.index.json`` names, each from the file it names.

    Raises :class:`CheckpointError`, for a missing file :class:`CheckpointNotFoundError`.
    """
    places = _weight_map(path)
    files = {}
    for name in sorted(set(places.values())):
        check_file(path.parent / name)
        files[name] = open_safetensors(path.parent / name)
    if lost := [name for name, file in places.items() if name not in files[file]]:
        raise CheckpointError(
            f"{label(path)} places {lost[0]:.100} in {places[lost[0]]:.60}, which lacks it: download both again"
        )
    return {name: files[file][name] for name, file in places.items()}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if any(Path(file).name != file for file in places.values()):  # a path would lead out of the folder
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{label(index)} is no index of safetensors files: download it again") from None
    return places
