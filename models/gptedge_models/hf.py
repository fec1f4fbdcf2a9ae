"""GPT-2 as Hugging Face stores it: names and transposes, ``config.json``, the hub."""

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .gpt import GPTModel
from .layout import Part, Plan, Shape, count_blocks
from .weights import CheckpointError, CheckpointNotFoundError, label

# In config.json: the names of the sizes, and the settings of which the book's GPT knows one value only.
_SIZES = {
    "vocab_size": "vocab_size",
    "n_positions": "context_length",
    "n_embd": "emb_dim",
    "n_head": "n_heads",
    "n_layer": "n_layers",
}
_FIXED = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
_EXACT_GELU = {"gelu_new": False, "gelu_pytorch_tanh": False, "gelu": True}
ANSWER_S = 10
"""How long the hub may take to say what it has."""

_FILES = ["config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
_FILES += ["tokenizer.json", "vocab.json", "merges.txt"]
_BLOCK = {
    "attn.c_attn.weight": Part(("att.W_query.weight", "att.W_key.weight", "att.W_value.weight"), transposed=True),
    "attn.c_attn.bias": Part(("att.W_query.bias", "att.W_key.bias", "att.W_value.bias")),
    "attn.c_proj.weight": Part(("att.out_proj.weight",), transposed=True),
    "attn.c_proj.bias": Part(("att.out_proj.bias",)),
    "mlp.c_fc.weight": Part(("ff.layers.0.weight",), transposed=True),
    "mlp.c_fc.bias": Part(("ff.layers.0.bias",)),
    "mlp.c_proj.weight": Part(("ff.layers.2.weight",), transposed=True),
    "mlp.c_proj.bias": Part(("ff.layers.2.bias",)),
    "ln_1.weight": Part(("norm1.scale",)),
    "ln_1.bias": Part(("norm1.shift",)),
    "ln_2.weight": Part(("norm2.scale",)),
    "ln_2.bias": Part(("norm2.shift",)),
}


def blocks_and_ends(root: str, n_layers: int) -> dict[str, Part]:
    """Return the parts of a GPT-2 whose names begin with ``root``: all but the head."""
    parts = {f"{root}wte.weight": Part(("tok_emb.weight",)), f"{root}wpe.weight": Part(("pos_emb.weight",))}
    for i in range(n_layers):
        parts |= {f"{root}h.{i}.{name}": part.under(f"trf_blocks.{i}.") for name, part in _BLOCK.items()}
    return parts | {f"{root}ln_f.weight": Part(("final_norm.scale",)), f"{root}ln_f.bias": Part(("final_norm.shift",))}


def hugging_face(stored: Mapping[str, Shape]) -> Plan | None:
    """Recognise the state dict of ``GPT2LMHeadModel`` or ``GPT2Model``."""
    root = "transformer." if any(name.startswith("transformer.") for name in stored) else ""
    if not any(name == f"{root}wte.weight" or name.startswith(f"{root}h.0.attn.c_") for name in stored):
        return None
    n_layers = count_blocks(rf"{root}h\.(\d+)\.", stored)
    parts = blocks_and_ends(root, n_layers)
    facts: dict[str, Any] = {"n_layers": n_layers, "qkv_bias": True}
    if "lm_head.weight" in stored:
        parts["lm_head.weight"] = Part(("out_head.weight",))
    else:
        facts["tie_word_embeddings"] = True
    masks = frozenset(f"{root}h.{i}.attn.{name}" for i in range(n_layers) for name in ("bias", "masked_bias"))
    return Plan(facts, parts, ignored=masks, config_file="config.json", needs_config=True)


def to_hugging_face(model: GPTModel) -> dict[str, Tensor]:
    """Return the state dict of the ``GPT2LMHeadModel`` that computes what ``model`` does.

    A head equal to the embedding is left out, for transformers to tie; biases that the model lacks are zero.
    """
    state = dict(model.state_dict())
    for i in range(model.config.n_layers):
        for name in ("W_query", "W_key", "W_value"):
            state.setdefault(f"trf_blocks.{i}.att.{name}.bias", torch.zeros(model.config.emb_dim))
    tensors = {name: part.join(state) for name, part in blocks_and_ends("transformer.", model.config.n_layers).items()}
    if not is_tied(model):
        tensors["lm_head.weight"] = state["out_head.weight"]
    return tensors


def is_tied(model: GPTModel) -> bool:
    """Tell whether the head is the embedding."""
    return torch.equal(model.out_head.weight, model.tok_emb.weight)


def translate_config(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Translate GPT-2's ``config.json`` into the book's settings, and ``tie_word_embeddings``.

    Raises :class:`CheckpointError` that names each setting which makes it another architecture.
    """
    wrong = [f"{key} {values[key]!r} (only {only!r})" for key, only in _FIXED.items() if values.get(key, only) != only]
    activation = values.get("activation_function", "gelu_new")
    if activation not in list(_EXACT_GELU):  # it may be a list, which has no hash
        wrong.append(f"activation_function {activation!r} (only 'gelu_new' or 'gelu')")
    width, inner = values.get("n_embd"), values.get("n_inner")
    if inner is not None and isinstance(width, int) and inner != 4 * width:
        wrong.append(f"n_inner {inner!r} (only 4 n_embd = {4 * width})")
    if wrong:
        raise CheckpointError(f"{label(path)} describes another architecture than the book's: {', '.join(wrong)}")
    sizes = {ours: values[theirs] for theirs, ours in _SIZES.items() if theirs in values}
    others = {"exact_gelu": _EXACT_GELU[activation], "tie_word_embeddings": values.get("tie_word_embeddings", True)}
    return sizes | others


def download(hub_id: str) -> Path:
    """Fetch config, weights and tokenizer of a hub repository, or find them in its cache; returns their folder.

    A connection that is lost is taken up again where it broke off, one that is silent is given up: the hub's own limits
    on a file (``HF_HUB_DOWNLOAD_TIMEOUT``) hold, and :data:`ANSWER_S` for its first answer.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError  # takes a while to import, and is needed only here

    try:
        with _silence():
            return checked(_fetch(hub_id))
    except CheckpointError:
        raise
    except LocalEntryNotFoundError:
        cause = "the hub cannot be reached"
    except Exception as error:  # the hub's own errors, and those of the HTTP library of its version
        cause = type(error).__name__
    raise CheckpointNotFoundError(
        f"{label(hub_id)} could not be fetched from the Hugging Face hub ({cause}): "
        "check name and network, or give the path of a downloaded folder"
    )


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        # snapshot_download would ask the same, and wait for the answer for ever
        found = HfApi().model_info(hub_id, timeout=ANSWER_S)
    except RepositoryNotFoundError:
        raise
    except Exception:  # no network, no answer, or told to stay offline
        return Path(snapshot_download(hub_id, allow_patterns=_FILES, local_files_only=True))
    names = sorted(file.rfilename for file in found.siblings or ())
    wanted = [name for name in names if any(fnmatchcase(name, pattern) for pattern in _FILES)]
    if not any(name.endswith(".safetensors") for name in wanted):
        raise CheckpointNotFoundError(f"{label(hub_id)} has no model.safetensors on the hub: choose another repository")
    (folder,) = {Path(hf_hub_download(hub_id, name)).parent for name in wanted}  # two if the repository just changed
    return folder


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Let the hub's library try again without a word: how it ends is told once, by us."""
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity

    level = get_verbosity()
    set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        set_verbosity(level)


def checked(folder: Path) -> Path:
    """Return a folder of the hub's cache whose files have the hash that the hub names them by.

    That is the SHA-256 of weights, and git's SHA-1 of small files. huggingface_hub resumes and times out, but compares
    sizes only. Raises :class:`CheckpointError`.
    """
    for path in sorted(path for pattern in _FILES for path in folder.glob(pattern)):
        blob = path.resolve()
        with blob.open("rb") as file:
            if re.fullmatch("[0-9a-f]{64}", blob.name):
                name, digest = "SHA-256", hashlib.file_digest(file, "sha256")
            elif re.fullmatch("[0-9a-f]{40}", blob.name):
                name, digest = "SHA-1", hashlib.sha1(b"blob %d\0%s" % (blob.stat().st_size, file.read()))
            else:  # a cache without links, as on Windows, keeps no hash
                continue
        if digest.hexdigest() != blob.name:
            raise CheckpointError(
                f"{path.name} is not the file that the hub has, its {name} differs: delete {label(blob)} and try again"
            )
    return folder
