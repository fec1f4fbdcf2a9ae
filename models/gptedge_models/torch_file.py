"""Files that ``torch.save`` wrote: a state dict, or a training checkpoint around one."""

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .weights import CheckpointError, Stored, Weights, label

_STATE_DICTS = ("model_state_dict", "model")  # in the training checkpoints of the book and of nanoGPT


def open_torch(path: Path) -> tuple[Weights, dict[str, Any]]:
    """List the tensors of a ``.pth`` or ``.pt`` file; return them and the settings of the model beside them, if any.

    Only tensors and plain values are unpickled. Raises :class:`CheckpointError`.
    """
    loaded = _load(path)
    if not isinstance(loaded, dict):
        raise _not_a_state_dict(path, loaded)
    state = next((loaded[key] for key in _STATE_DICTS if key in loaded), loaded)
    settings = loaded.get("model_args", {})
    if not isinstance(state, dict) or not isinstance(settings, dict):
        raise _not_a_state_dict(path, state if isinstance(settings, dict) else settings)
    weights = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            what = f"{name!r:.40} of type {type(tensor).__name__}"
            raise CheckpointError(f"{label(path)} holds {what} among its tensors: save model.state_dict() alone")
        weights[name] = Stored(tuple(tensor.shape), tensor.detach, lasting=True)
    return weights, settings


def _not_a_state_dict(path: Path, found: object) -> CheckpointError:
    return CheckpointError(f"{label(path)} holds a {type(found).__name__}: save model.state_dict() instead")


def _load(path: Path) -> Any:
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
