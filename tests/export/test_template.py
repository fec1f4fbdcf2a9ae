"""An instruction model's prompt template, from the export to the prompt."""

import json
from pathlib import Path

import pytest
from gptedge_export import ExportError
from gptedge_export.template import ALPACA, load_template

from ..commands import run

CONFIG = '{"vocab_size": 257, "context_length": 400, "emb_dim": 8, "n_heads": 1, "n_layers": 1}'


def book_prompt(instruction: str, text: str) -> str:
    """Write an entry of the instruction data as the book's ``format_input`` does, and where its answer begins."""
    task = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    given = f"\n\n### Input:\n{text}" if text else ""
    return f"{task}\n\n### Instruction:\n{instruction}{given}\n\n### Response:\n"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    (folder / "config.json").write_text(CONFIG)
    options = ["--config", str(folder / "config.json"), "--tokenizer", "bytes", "--template", "alpaca", "-q"]
    result = run("export-onnx", "random", *options, "-o", folder / "bundle")
    assert result.returncode == 0, result.stderr
    return folder / "bundle"


@pytest.mark.parametrize(("text", "prompt"), [("", "Say {x}."), ("Hi {prompt}", "Say it.\n\n### Input:\nHi {prompt}")])
def test_the_prompt_is_the_books(bundle: Path, text: str, prompt: str) -> None:
    result = run("gptedge", "generate", bundle, prompt, "--template", "-n", "1", "--json")
    assert bytes(json.loads(result.stdout)["prompt_token_ids"]).decode() == book_prompt(prompt.split("\n")[0], text)


def test_without_the_option_the_prompt_is_as_it_is(bundle: Path) -> None:
    result = run("gptedge", "generate", bundle, "Say it.", "-n", "1", "--json")
    assert bytes(json.loads(result.stdout)["prompt_token_ids"]) == b"Say it."


def test_a_bundle_without_a_template_says_so(tiny_bundle: Path) -> None:
    result = run("gptedge", "generate", tiny_bundle, "Say it.", "--template")
    assert (result.returncode, result.stdout) == (2, "")
    assert "no prompt template" in result.stderr


def test_a_template_comes_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "phi.txt").write_text("<|user|>\n{prompt}\n<|assistant|>:")
    assert load_template(str(tmp_path / "phi.txt")) == "<|user|>\n{prompt}\n<|assistant|>:"
    assert load_template("alpaca") == ALPACA


@pytest.mark.parametrize(
    ("content", "cause"), [(b"no place", "0 times"), (b"{prompt}" * 2, "2 times"), (b"\xff", "read")]
)
def test_a_file_that_is_no_template_is_refused(tmp_path: Path, content: bytes, cause: str) -> None:
    (tmp_path / "template.txt").write_bytes(content)
    with pytest.raises(ExportError, match=cause):
        load_template(str(tmp_path / "template.txt"))


def test_a_missing_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be read"):
        load_template(str(tmp_path / "none"))
