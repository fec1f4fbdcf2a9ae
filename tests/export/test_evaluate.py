"""Perplexity against the eager model's cross-entropy."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gptedge_models import GPTModel
from gptedge_runtime import GPT, InputError, load
from gptedge_runtime.evaluate import evaluate

from ..commands import run

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 2
CONTEXT = 24


@pytest.fixture(scope="module")
def gpt(tiny_bundle: Path) -> Iterator[GPT]:
    with load(tiny_bundle) as gpt:
        yield gpt


@torch.no_grad()
def eager_nats(model: GPTModel, ids: list[int], stride: int) -> list[float]:
    """Score each token but the first by itself: in the first window that reaches it, from all that comes before."""
    nats = []
    for place in range(1, len(ids)):
        begin = max(0, math.ceil((place - CONTEXT) / stride)) * stride
        logits = model(torch.tensor([ids[begin:place]]))[0, -1]
        nats.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[place]))))
    return nats


@pytest.mark.parametrize("length", [2, CONTEXT, CONTEXT + 1, CONTEXT + 2, len(TEXT)])
@pytest.mark.parametrize("stride", [1, 5, 12, 24])
def test_perplexity_is_that_of_the_eager_model(tiny_model: GPTModel, gpt: GPT, length: int, stride: int) -> None:
    done = evaluate(gpt, TEXT[:length], stride=stride)
    nats = eager_nats(tiny_model, list(TEXT[:length].encode()), stride)
    assert (done.tokens, done.window, done.stride) == (length - 1, CONTEXT, stride)
    # float32 logits, held to 2e-5 at export; 4 digits are promised
    assert done.perplexity == pytest.approx(math.exp(sum(nats) / len(nats)), rel=2e-5)


def test_the_default_stride_is_half_the_context(gpt: GPT) -> None:
    assert evaluate(gpt, TEXT) == evaluate(gpt, TEXT, stride=12)


@pytest.mark.parametrize(("text", "stride", "said"), [("a", 1, "1 tokens"), ("", 1, "0 tokens"), (TEXT, 25, "stride")])
def test_what_cannot_be_scored_is_refused(gpt: GPT, text: str, stride: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        evaluate(gpt, text, stride=stride)


def test_the_command_prints_what_the_library_returns(tiny_bundle: Path, gpt: GPT, tmp_path: Path) -> None:
    text = TEXT + "\n\n"
    (tmp_path / "text.txt").write_text(text)
    done = evaluate(gpt, text, stride=12)
    answer = json.loads(run("gptedge", "eval", tiny_bundle, tmp_path / "text.txt", "--stride", "12", "--json").stdout)
    assert answer["perplexity"] == pytest.approx(done.perplexity, rel=1e-6)
    line = run("gptedge", "eval", tiny_bundle, tmp_path / "text.txt").stdout
    assert line == f"perplexity {done.perplexity:,.4f} over {len(text) - 1} tokens, window 24, stride 12\n"


def test_a_missing_text_is_one_line(tiny_bundle: Path) -> None:
    result = run("gptedge", "eval", tiny_bundle, "no/such.txt")
    assert (result.returncode, result.stdout) == (2, "")
    assert "cannot read no/such.txt" in result.stderr
