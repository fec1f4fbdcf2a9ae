"""Checkpoints to models: :func:`load_checkpoint`."""

import re
from collections.abc import Mapping
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from torch import Tensor, nn

from .book import book
from .files import open_weights
from .gpt import CONFIGS, GPTConfig, GPTModel
from .hf import download, hugging_face
from .layout import Part, Plan, Shape, empty_model, shapes
from .nanogpt import nanogpt
from .openai import openai
from .settings import Settings, agree, given_settings, make_config, read_settings, translated
from .weights import MESSAGE_LENGTH, CheckpointError, CheckpointNotFoundError, Stored, Weights, label

__all__ = ["CheckpointError", "CheckpointNotFoundError", "load_checkpoint"]

RECOGNISERS = (book, nanogpt, hugging_face, openai)  # names and shapes -> Plan, or None where they are another's

_DEMO = Path(__file__).parent / "demo"
_HUB_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Name, rank and axis where a size can be seen: what most say counts, so that one wrong tensor is the one that is named.
_SIZES = {
    "vocab_size": (("tok_emb.weight", 2, 0), ("out_head.weight", 2, 0)),
    "context_length": (("pos_emb.weight", 2, 0), ("trf_blocks.0.att.mask", 2, 0)),
    "emb_dim": (("tok_emb.weight", 2, 1), ("pos_emb.weight", 2, 1), ("final_norm.scale", 1, 0)),
}


def load_checkpoint(
    source: str | Path, *, config: GPTConfig | Mapping[str, Any] | str | Path | None = None, seed: int = 123
) -> GPTModel:
    """Return the model of a checkpoint, float32, in eval mode.

    ``source``: ``"demo"``; ``"random"`` (the book's weights for ``seed``; needs ``config``); ``"gpt2"``,
    ``"gpt2-medium"``, ``"gpt2-large"``, ``"gpt2-xl"`` or another hub id ``owner/name``; or a path: a ``.pth`` of the
    book or of its faster variants (a state dict, or a dict that holds one as ``model_state_dict``), a safetensors file
    with the book's names, nanoGPT's ``ckpt.pt``, a Hugging Face GPT-2 folder, or the folder of OpenAI's TensorFlow
    checkpoint. ``config``: a :class:`GPTConfig`, the book's dict, a name in ``CONFIGS`` or a JSON file; needed where
    the checkpoint does not say ``n_heads``. A ``GPTConfig`` without ``exact_gelu`` says nothing of GELU.

    A head with a bias is that of chapter 6's classifier: ``model.out_head.out_features`` classes. A head equal to the
    embedding shares its memory. The float32 weights of a ``.pth`` stay mapped: while the model lives, replace the file
    by renaming, never write into it. Raises :class:`CheckpointError`, also for every tensor that is missing,
    unexpected, mis-shaped, not a float or not finite; a missing file is a ``FileNotFoundError`` too.
    """
    given = given_settings(config)
    if source == "random":
        return _random(given, seed)
    path = locate(source)
    weights, settings = open_weights(path)
    plan = _recognise(path, weights)
    statements = {
        "the given config": given,
        "model_args": translated(settings, path),
        plan.config_file or "config.json": _beside(path, plan),
        "the tensors": {**plan.facts, **_sizes(plan, weights)},
    }
    facts = {**plan.defaults, **agree(path, statements)}
    tied = facts.pop("tie_word_embeddings", False)
    model = empty_model(_complete(path, facts))
    if plan.n_classes:
        model.out_head = nn.Linear(model.config.emb_dim, plan.n_classes, device="meta")
    state = _read(path, weights, plan, shapes(model))
    if tied and state["out_head.weight"] is not state["tok_emb.weight"]:
        raise CheckpointError(f"{label(path)} has lm_head unlike wte: set tie_word_embeddings false in config.json")
    model.load_state_dict(state, assign=True)
    return model.eval()


def _random(given: Settings, seed: int) -> GPTModel:
    given.pop("tie_word_embeddings", None)
    if not given:
        raise CheckpointError(f"random needs a config: give --config, one of {', '.join(CONFIGS)}, or a JSON file")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise CheckpointError(f"seed is {seed!r:.40}: give a whole number from 0 to 2**63 - 1")
    config = make_config("the given config", given)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # as torch.manual_seed, but leaves the generators of GPUs alone
        try:
            return GPTModel(config).eval()
        except (RuntimeError, TypeError):  # the allocator's answer, and torch's to sizes of more than 63 bits
            raise CheckpointError("random: no memory for a model of this config: choose smaller sizes") from None


def locate(source: str | Path) -> Path:
    """Return the path of a checkpoint; that of a hub id is in the hub's cache, fetched if need be.

    Raises :class:`CheckpointError`.
    """
    if source == "demo":
        return _DEMO
    if source in _HUB_NAMES:
        return download(_HUB_NAMES[str(source)])
    path = Path(source)
    is_hub_id = isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", source)
    if is_hub_id and not path.exists() and path.suffix not in (".pth", ".pt", ".safetensors"):
        return download(str(source))
    return path


def _recognise(path: Path, weights: Weights) -> Plan:
    stored = {name: tensor.shape for name, tensor in weights.items()}
    for recognise in RECOGNISERS:
        if plan := recognise(stored):
            return plan
    names = ", ".join(f"{name:.50}" for name in list(weights)[:3])
    raise CheckpointError(f"{label(path)} holds another model ({names}, ...): give the book's GPTModel or GPT-2")


def _beside(path: Path, plan: Plan) -> Settings:
    """Return what the config file beside the tensors states; Hugging Face's layout means nothing without one."""
    if not (path.is_dir() or plan.config_file):
        return {}  # a .pth lies among files of any kind
    file = (path if path.is_dir() else path.parent) / (plan.config_file or "config.json")
    if file.exists():
        return read_settings(file)
    if plan.needs_config:
        raise CheckpointNotFoundError(f"{label(path)} is GPT-2 without config.json: put that file beside it")
    return {}


def _sizes(plan: Plan, weights: Weights) -> dict[str, int]:
    found = {part.names[0]: weights[name].shape for name, part in plan.parts.items() if name in weights}
    sizes = {}
    for size, places in _SIZES.items():
        if seen := [found[name][axis] for name, rank, axis in places if len(found.get(name, ())) == rank]:
            sizes[size] = mode(seen)
    return sizes


def _complete(path: Path, facts: Settings) -> GPTConfig:
    """Return the config of a checkpoint; ``n_heads`` leaves no trace in the tensors, so only GPT-2's sizes imply it."""
    if unseen := _SIZES.keys() - facts.keys():  # then tensors are missing, which _read names whatever the sizes are
        return make_config(label(path), {**facts, **dict.fromkeys(unseen, 1), "n_heads": 1})
    if "n_heads" not in facts:
        sizes = ("vocab_size", "context_length", "emb_dim", "n_layers")
        known = [c for c in CONFIGS.values() if all(getattr(c, size) == facts[size] for size in sizes)]
        if not known:
            raise CheckpointError(
                f"{label(path)} does not say n_heads: give --config, one of {', '.join(CONFIGS)}, "
                "or a JSON file that holds n_heads"
            )
        facts = {**facts, "n_heads": known[0].n_heads}
    return make_config(label(path), facts)


def _read(path: Path, weights: Weights, plan: Plan, wanted: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Read the whole state dict, one stored tensor at a time; one error names all that is wrong."""
    state: dict[str, Tensor] = {}
    faults: dict[str, list[str]] = {
        "missing": [name for name in plan.parts if name not in weights],
        "unexpected": [name for name in weights if name not in plan.parts and name not in plan.ignored],
    }
    for name in (name for name in plan.parts if name in weights):
        part, found = plan.parts[name], weights[name].shape
        expected = part.stored_shape(wanted[part.names[0]])
        if found != expected:
            faults.setdefault("wrong shape", []).append(f"{name} {found} not {expected}")
            continue
        tensors, fault = _take(part, weights[name])
        state |= tensors
        if fault:
            faults.setdefault(fault, []).append(name)
    if any(faults.values()):
        raise CheckpointError(_explain(path, faults))
    state |= {name: torch.zeros(wanted[name], device="cpu", dtype=torch.float32) for name in plan.zeros}
    return _completed(state, wanted)


def _take(part: Part, stored: Stored) -> tuple[dict[str, Tensor], str]:
    """Return the model's tensors that a stored one holds, float32, and what is wrong with them or ``""``."""
    is_mask = part.names[0].endswith(".mask")
    whole = stored.read()
    if whole.layout is not torch.strided or whole.is_meta:
        return {}, "without values"
    if whole.dtype not in _FLOATS and not (is_mask and whole.dtype is torch.bool):
        return {}, f"{whole.dtype} not float32"
    tensors = {
        name: piece.to(torch.float32, copy=not stored.lasting, memory_format=torch.contiguous_format).contiguous()
        for name, piece in part.split(whole)
    }
    if is_mask:
        return tensors, "" if all(torch.equal(t, _causal_mask(len(t))) for t in tensors.values()) else "not causal"
    ends = torch.stack([end for tensor in tensors.values() for end in torch.aminmax(tensor)])  # NaN spreads to both
    return tensors, "" if ends.isfinite().all() else "not finite"


def _completed(state: dict[str, Tensor], wanted: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Add the masks that are missing; let a head equal to the embedding share its memory."""
    for name, shape in wanted.items():
        if name.endswith(".mask") and name not in state:
            state[name] = _causal_mask(shape[0])
    embedding = state["tok_emb.weight"]
    if torch.equal(state.setdefault("out_head.weight", embedding), embedding):
        state["out_head.weight"] = embedding
    return state


def _causal_mask(length: int) -> Tensor:
    return torch.triu(torch.ones(length, length, device="cpu", dtype=torch.float32), diagonal=1)


def _explain(path: Path, faults: dict[str, list[str]]) -> str:
    """Name as many tensors of each fault as one line holds, and count the others."""
    for shown in (3, 2, 1):
        lists = []
        for fault, names in faults.items():
            rest = f" and {len(names) - shown} more" if len(names) > shown else ""
            if names:
                lists.append(f"{fault} {', '.join(f'{name:.100}' for name in names[:shown])}{rest}")
        line = f"{label(path)}: tensors {'; '.join(lists)}: save the state dict again"
        if len(line) <= MESSAGE_LENGTH:
            break
    return line
