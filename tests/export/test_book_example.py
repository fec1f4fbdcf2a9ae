"""The book's example through the whole path, at its real size: 124M parameters, seed 123, "Hello, I am"."""

import json
from pathlib import Path

import pytest
import torch
from gptedge_export import Vocabulary
from gptedge_models import CONFIGS, GPTModel, generate_text_simple

from ..commands import run


@pytest.fixture(scope="module")
def bundle(gpt2: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("book")
    (folder / "gpt2.tiktoken").write_bytes(gpt2.to_tiktoken())
    source = ("random", "--config", "gpt2-small", "--seed", "123", "--tokenizer", folder / "gpt2.tiktoken")
    result = run("export-onnx", *source, "-o", folder / "bundle")
    assert result.returncode == 0, result.stderr
    return folder / "bundle"


def test_the_ids_are_the_seeded_models(bundle: Path) -> None:
    torch.manual_seed(123)
    model = GPTModel(CONFIGS["gpt2-small"]).eval()
    prompt = torch.tensor([[15496, 11, 314, 716]])
    expected = generate_text_simple(model, prompt, max_new_tokens=6, context_size=1024)[0, 4:].tolist()
    result = run("gptedge", "generate", bundle, "Hello, I am", "-n", "6", "--json")
    answer = json.loads(result.stdout)
    assert answer["prompt_token_ids"] == [15496, 11, 314, 716]
    assert answer["token_ids"] == expected


def test_every_comparison_of_the_export_passed_up_to_the_context(bundle: Path) -> None:
    report = json.loads((bundle / "export_report.json").read_text())
    assert {1, 2, 3, 511, 512, 513, 1023, 1024} <= {check["length"] for check in report["checks"]}
    assert all(check["max_abs_diff"] <= check["bound"] for check in report["checks"])
