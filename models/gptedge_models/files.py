"""From a path to tensors: which files hold them, and who reads each kind of file."""

from pathlib import Path
from typing import Any

from .safetensors_file import open_index, open_safetensors
from .tensor_bundle import latest_checkpoint, open_tensor_bundle
from .torch_file import open_torch
from .weights import CheckpointError, CheckpointNotFoundError, Weights, check_file, label

_INDEX = ".safetensors.index.json"
_SUFFIXES = (".pth", ".pt", ".safetensors", _INDEX, ".index")


def open_weights(path: Path) -> tuple[Weights, dict[str, Any]]:
    """List the tensors of a file or folder; return them and the settings of the model that the file itself states.

    Nothing is read yet. Raises :class:`CheckpointError`.
    """
    weights: Weights = {}
    settings: dict[str, Any] = {}
    try:
        for file in _files(path):
            check_file(file)
            if file.name.endswith(_INDEX):
                weights = open_index(file)
            elif file.suffix == ".safetensors":
                weights |= open_safetensors(file)
            elif file.suffix == ".index":
                weights = open_tensor_bundle(file)
            else:
                weights, settings = open_torch(file)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{label(path)} cannot be read: {error.strerror or type(error).__name__}") from None
    if not weights:
        raise CheckpointError(f"{label(path)} holds no tensors: save model.state_dict() again")
    return _without_prefix(weights), settings


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return _files_of_folder(path)
    if path.exists() and not (path.name.endswith(_SUFFIXES) and path.is_file()):
        raise CheckpointError(
            f"{label(path)} is no checkpoint: give a .pth, .pt, .safetensors or .index file, or a folder"
        )
    return [path]


def _files_of_folder(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "model" + _INDEX):
        if (folder / name).exists():
            return [folder / name]
    if shards := sorted(folder.glob("model-*-of-*.safetensors")):
        return shards
    if (folder / "checkpoint").is_file():
        return [latest_checkpoint(folder)]
    if others := sorted(file.name for file in folder.iterdir() if file.name.endswith(_SUFFIXES)):
        raise CheckpointNotFoundError(f"{label(folder)} holds no model.safetensors: give the file {others[0]} itself")
    raise CheckpointNotFoundError(f"{label(folder)} holds no model.safetensors: save the model there as safetensors")


def _without_prefix(weights: Weights) -> Weights:
    """Strip what ``torch.compile`` and ``DistributedDataParallel`` put before every name."""
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): stored for name, stored in weights.items()}
    return weights
