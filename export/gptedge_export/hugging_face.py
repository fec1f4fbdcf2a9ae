"""The same weights as a Hugging Face GPT-2 folder, for transformers, vLLM, llama.cpp or CTranslate2 to load."""

import json
from pathlib import Path
from typing import Any

from gptedge_models import GPTModel
from gptedge_models.hf import is_tied, to_hugging_face
from safetensors import SafetensorError
from safetensors.torch import save_file

from .atomic import atomic_folder
from .classifier import is_classifier
from .companions import companions
from .errors import ExportError
from .vocabulary import Vocabulary


def export_hugging_face(model: GPTModel, out: Path | str, *, vocabulary: Vocabulary) -> None:
    """Write config, float32 weights and tokenizer of ``model`` into the new folder ``out``, in place in one step.

    Raises :class:`ExportError` where ``out`` exists or cannot be written, or the tokenizer is not the model's.
    """
    out = Path(out)
    if out.exists():
        raise ExportError(f"{out} exists: choose another -o")
    if is_classifier(model):
        raise ExportError("the model is a classifier: only models that generate text go to Hugging Face's GPT-2")
    if vocabulary.size > model.config.vocab_size:
        raise ExportError(
            f"the tokenizer has {vocabulary.size:,} tokens, the model only {model.config.vocab_size:,}: "
            f"give the tokenizer of this model with --tokenizer"
        )
    with atomic_folder(out, replace=False) as folder:
        try:
            save_file(to_hugging_face(model), folder / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:  # its word for what the disk did not take
            raise OSError(str(error)) from error
        for name, document in _documents(model, vocabulary).items():
            (folder / name).write_text(json.dumps(document, ensure_ascii=False, indent=2) + "\n", "utf-8")
        (folder / "merges.txt").write_text(_merges(vocabulary), "utf-8")


def _documents(model: GPTModel, vocabulary: Vocabulary) -> dict[str, Any]:
    documents = companions(model.config, vocabulary)
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    documents = {name: documents[name] for name in names}
    config = {key: value for key, value in documents["config.json"].items() if not key.startswith("transformers.js")}
    documents["config.json"] = config | {"tie_word_embeddings": is_tied(model), "torch_dtype": "float32"}
    documents["vocab.json"] = documents["tokenizer.json"]["model"]["vocab"]
    return documents


def _merges(vocabulary: Vocabulary) -> str:
    pairs = vocabulary.to_hugging_face()["model"]["merges"]
    return "".join(["#version: 0.2\n", *(f"{left} {right}\n" for left, right in pairs)])
