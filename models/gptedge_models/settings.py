"""The config of a checkpoint, from all who state something of it: the caller, the files, the tensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .gpt import CONFIGS, GPTConfig
from .hf import translate_config
from .nanogpt import translate_model_args
from .openai import translate_hparams
from .weights import CheckpointError, CheckpointNotFoundError, label

Settings = dict[str, Any]
"""Those of the book's dict, some or all, and ``tie_word_embeddings``."""


def given_settings(config: GPTConfig | Mapping[str, Any] | str | Path | None) -> Settings:
    """Return the settings that a config states; a name in ``CONFIGS`` states sizes only."""
    if config is None:
        return {}
    if isinstance(config, GPTConfig):
        return config.to_dict()
    if isinstance(config, Mapping):
        return dict(config)
    if config in CONFIGS:
        settings = CONFIGS[str(config)].to_dict()
        return {name: settings[name] for name in settings if name not in ("drop_rate", "qkv_bias")}
    if Path(config).suffix != ".json":
        raise CheckpointError(f"config {label(config)} is neither one of {', '.join(CONFIGS)} nor a .json file")
    return read_settings(Path(config))


def read_settings(path: Path) -> Settings:
    """Return the settings that a JSON file states, whoever's names it uses. Raises :class:`CheckpointError`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointNotFoundError(f"{label(path)} does not exist: check the path") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{label(path)} is no readable JSON file ({type(error).__name__}): correct it") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{label(path)} holds a JSON {type(values).__name__}: give an object with the settings")
    return translated(values, path)


_HUGGING_FACE = {"model_type", "n_positions", "n_ctx", "activation_function", "layer_norm_epsilon", "initializer_range"}


def translated(values: Mapping[str, Any], path: Path) -> Settings:
    """Return settings under the book's names, whoever wrote them. Raises :class:`CheckpointError`."""
    if "n_vocab" in values:
        return translate_hparams(values)
    if _HUGGING_FACE & values.keys():
        return translate_config(values, path)
    if {"block_size", "n_embd"} & values.keys():  # sizes alone, which GPT-2 has under the same names: no word of GELU
        return translate_model_args(values)
    return dict(values)


def agree(path: Path, statements: Mapping[str, Settings]) -> Settings:
    """Merge what each source states; two that differ are an error naming both. Dropout is the first source's choice."""
    facts: Settings = {}
    by: dict[str, str] = {}
    conflicts = []
    for source, settings in statements.items():
        for name, value in settings.items():
            if name in facts and facts[name] != value and name != "drop_rate":
                conflicts.append(f"{by[name]} says {name} {facts[name]!r:.20}, {source} {value!r:.20}")
            facts.setdefault(name, value)
            by.setdefault(name, source)
    if conflicts:
        raise CheckpointError(f"{label(path)}: {'; '.join(conflicts[:3])}: correct the config or leave it out")
    return facts


def make_config(source: str, settings: Settings) -> GPTConfig:
    """Return the config of complete settings. Raises :class:`CheckpointError` that names ``source``."""
    try:
        return GPTConfig.from_dict(settings)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None
