"""The book's chapter 6 classifier, from its state dict to the command, against the book's way to classify."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gptedge_export import export_bundle, load_vocabulary
from gptedge_export.classifier import Classifier, describe_classifier
from gptedge_export.errors import ExportError
from gptedge_models import CheckpointError, GPTConfig, GPTModel, load_checkpoint
from gptedge_runtime import BundleError, InputError, load, load_classifier
from gptedge_runtime import Classifier as TextClassifier
from torch import nn

from ..commands import run
from ..signing import sign

CONFIG = GPTConfig(vocab_size=257, context_length=16, emb_dim=8, n_heads=2, n_layers=1, qkv_bias=True)
PAD, MAX_LENGTH = 256, 12
TEXTS = ["a", "free money", "x" * MAX_LENGTH, "You won a prize, call now", "\u00e9\n"]


@pytest.fixture(scope="module")
def model() -> GPTModel:
    torch.manual_seed(5)
    model = GPTModel(CONFIG).eval()
    model.out_head = nn.Linear(CONFIG.emb_dim, 2)
    nn.init.normal_(model.out_head.weight, std=3.0)
    return model


@pytest.fixture(scope="module")
def folder(model: GPTModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the classifier's state dict and its bundle."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.save(model.state_dict(), folder / "review_classifier.pth")
    (folder / "heads.json").write_text('{"n_heads": 2}')
    source = [str(folder / "review_classifier.pth"), "--config", str(folder / "heads.json"), "--tokenizer", "bytes"]
    options = ["--labels", "not spam,spam", "--max-length", str(MAX_LENGTH), "-q"]
    result = run("export-onnx", *source, *options, "-o", folder / "bundle")
    assert result.returncode == 0, result.stderr
    return folder


@torch.no_grad()
def book_probabilities(model: GPTModel, text: str) -> list[float]:
    """Classify as the book's ``classify_review``: cut, pad with end-of-text, take the last token's logits."""
    ids = list(text.encode())[:MAX_LENGTH]
    ids += [PAD] * (MAX_LENGTH - len(ids))
    probabilities: list[float] = torch.softmax(model(torch.tensor([ids]))[0, -1], dim=-1).tolist()
    return probabilities


@pytest.mark.parametrize("text", TEXTS)
def test_the_class_is_the_books(model: GPTModel, folder: Path, text: str) -> None:
    answer = load_classifier(folder / "bundle").classify(text)
    expected = book_probabilities(model, text)
    assert list(answer.probabilities.values()) == pytest.approx(expected, abs=1e-5)  # float32 logits of both sides
    assert answer.label == ("spam" if expected[1] > expected[0] else "not spam")


@torch.no_grad()
@pytest.mark.parametrize("text", ["a", "free money", "x" * 40])
def test_without_padding_the_texts_own_last_token_decides(model: GPTModel, folder: Path, text: str) -> None:
    padded = load_classifier(folder / "bundle")
    classifier = TextClassifier(padded._tokenizer, padded._session, replace(padded._spec, max_length=0))
    ids = torch.tensor([list(text.encode())[: CONFIG.context_length]])
    expected = torch.softmax(model(ids)[0, -1], dim=-1).tolist()
    assert list(classifier.classify(text).probabilities.values()) == pytest.approx(expected, abs=1e-5)


def test_both_classes_occur_among_the_texts(model: GPTModel) -> None:
    assert {book_probabilities(model, text)[1] > 0.5 for text in TEXTS} == {True, False}


def test_the_command_prints_the_class(folder: Path) -> None:
    answer = load_classifier(folder / "bundle").classify("free money")
    assert run("gptedge", "classify", folder / "bundle", "free money").stdout == f"{answer.label}\n"
    printed = json.loads(run("gptedge", "classify", folder / "bundle", "--json", stdin="free money\n").stdout)
    assert printed == {"label": answer.label, "probabilities": answer.probabilities}


def test_the_bundle_verifies(folder: Path) -> None:
    result = run("gptedge", "verify", folder / "bundle")
    assert (result.returncode, result.stderr) == (0, "")
    assert "3 graphs" in result.stdout


def test_no_other_tool_takes_it_for_a_model_that_generates(folder: Path) -> None:
    assert not any((folder / "bundle" / name).exists() for name in ("config.json", "genai_config.json"))


def test_the_loaded_model_is_the_saved_one(model: GPTModel, folder: Path) -> None:
    loaded = load_checkpoint(folder / "review_classifier.pth", config={"n_heads": 2}).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["out_head.weight", "out_head.bias"])
@pytest.mark.parametrize("fault", ["wrong shape", "not finite"])
def test_a_faulty_head_is_named(model: GPTModel, tmp_path: Path, name: str, fault: str) -> None:
    state = model.state_dict()
    state[name] = state[name][None] if fault == "wrong shape" else state[name] / 0
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=f"{fault} .*{name}"):
        load_checkpoint(tmp_path / "model.pth", config={"n_heads": 2})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"labels": None, "max_length": None}, "classifier of 2 classes: give --max-length"),
        ({"labels": None, "max_length": 17}, "--max-length is 17: .* to 16"),
        ({"labels": None, "max_length": -1}, "--max-length is -1: .* to 16"),
        ({"labels": "spam", "max_length": 12}, "does not name 2 classes"),
        ({"labels": "spam,spam", "max_length": 12}, "does not name 2 classes"),
        ({"labels": "spam,", "max_length": 12}, "does not name 2 classes"),
    ],
    ids=str,
)
def test_what_the_weights_do_not_say_is_asked_for(model: GPTModel, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ExportError, match=said):
        describe_classifier(model, load_vocabulary("bytes"), **options)


def test_classes_without_names_are_numbered(model: GPTModel) -> None:
    described = describe_classifier(model, load_vocabulary("bytes"), labels=None, max_length=0)
    assert described == Classifier(("0", "1"), 0, PAD)


def test_only_a_classifier_takes_labels() -> None:
    with pytest.raises(ExportError, match="no classifier"):
        describe_classifier(GPTModel(CONFIG), load_vocabulary("bytes"), labels="a,b", max_length=None)


def test_each_kind_of_bundle_names_the_other_command(folder: Path, tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="gptedge classify"):
        load(folder / "bundle")
    with pytest.raises(InputError, match="gptedge generate"):
        load_classifier(tiny_bundle)


def test_the_page_refuses_a_classifier(folder: Path) -> None:
    result = run("gptedge", "web", folder / "bundle")
    assert (result.returncode, result.stdout) == (2, "")
    assert "is a classifier, and the page writes text: use gptedge classify" in result.stderr


def test_a_text_without_tokens_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="no tokens"):
        load_classifier(folder / "bundle").classify("")


def test_export_hf_refuses_a_classifier(folder: Path) -> None:
    source = [str(folder / "review_classifier.pth"), "--config", str(folder / "heads.json"), "--tokenizer", "bytes"]
    result = run("export-hf", *source, "-o", folder / "hf")
    assert (result.returncode, result.stdout) == (2, "")
    assert "is a classifier" in result.stderr


def test_logits_that_are_not_finite_are_no_class(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "bundle", tmp_path / "bundle")
    weights = np.memmap(tmp_path / "bundle/onnx/model.onnx_data", np.float32, "r+")
    weights[:] = np.nan
    weights.flush()
    classifier = load_classifier(sign(tmp_path / "bundle"))
    with pytest.raises(BundleError, match="not finite"):
        classifier.classify("a")


def test_the_library_asks_for_the_classes_too(model: GPTModel, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="give a Classifier"):
        export_bundle(model, tmp_path / "bundle", vocabulary=load_vocabulary("bytes"))
