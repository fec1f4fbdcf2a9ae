"""The tokenizers that our JavaScript uses give tiktoken's ids for any text."""

import random
from pathlib import Path

import pytest
import tiktoken
from gptedge_export import Vocabulary

from .conftest import ROOT, Need, Task, run_host

# letters, marks, digits and spaces of many scripts; those on which \s of JavaScript and of Unicode differ
ALPHABET = [
    *"aZ09 '\n\t\r.,!st<|>\x00\x1c\x1f\x7f\u0085\u00a0\u180e\u200b\u2028\u3000\ufeff\u0300\u20e3ßé①٣ᾳǅ中文😀",
    *(
        "'s",
        "'ll",
        "'LL",
        "  ",
        "<|endoftext|>",
        "e\u0301",
        "\N{MATHEMATICAL DOUBLE-STRUCK DIGIT ZERO}",
        "👩‍👩‍👧",
        "🇩🇪",
        "constructor",
        "1234",
    ),
]


def texts() -> list[str]:
    draw = random.Random(7)
    found = ["".join(draw.choices(ALPHABET, k=draw.randrange(1, 16))) for _ in range(4000)]
    return ["", " ", "\n", "a" * 3000, " " * 3000, *found]


@pytest.fixture(scope="module")
def answer(task: Task, node: Path, need: Need) -> dict[str, list[list[int]]]:
    need("the Node example's node_modules", ROOT / "examples/node/node_modules/js-tiktoken")
    return run_host(node, "hosts/tokenizers.mjs", task.to_json(prompts=texts()))


@pytest.mark.parametrize("tokenizer", ["example", "page"])
def test_ids_are_tiktokens(answer: dict[str, list[list[int]]], encoding: tiktoken.Encoding, tokenizer: str) -> None:
    wrong = [
        text for text, ids in zip(texts(), answer[tokenizer], strict=True) if ids != encoding.encode_ordinary(text)
    ]
    assert wrong == []


def test_the_page_knows_the_bytes_of_every_token(answer: dict[str, list[list[int]]], vocabulary: Vocabulary) -> None:
    assert [bytes(token) for token in answer["bytes"]] == vocabulary.ranks
