"""The tokenizer against tiktoken, and the vocabularies it refuses."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from gptedge_runtime import GPT, BundleError, InputError, load
from gptedge_runtime.tokenizer import parse_ranks
from hypothesis import given
from hypothesis import strategies as st

Edit = Callable[[Callable[[dict[str, Any]], object]], Path]

MERGES = [b"he", b"ll", b"hell", b"\xf0\x9f", b"\xf0\x9f\x98"]
RANKS = [bytes([byte]) for byte in range(256)] + MERGES
PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # GPT-2's, as OpenAI published it
)
ORACLE = tiktoken.Encoding(
    "tiny",
    pat_str=PATTERN,
    mergeable_ranks={token: i for i, token in enumerate(RANKS)},
    special_tokens={"<|endoftext|>": 261},
)
TEXTS = st.text(st.characters() | st.sampled_from("hel \n😀'"))


def lines(tokens: list[bytes]) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


@given(text=TEXTS)
def test_ids_are_tiktokens(tiny: GPT, text: str) -> None:
    assert tiny.tokenizer.encode(text) == ORACLE.encode(text, disallowed_special=())


@given(ids=st.lists(st.integers(0, 261)))
def test_text_is_tiktokens(tiny: GPT, ids: list[int]) -> None:
    assert tiny.tokenizer.decode(ids) == ORACLE.decode(ids)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_text_comes_back(tiny: GPT, text: str) -> None:
    assert tiny.tokenizer.decode(tiny.tokenizer.encode(text)) == text


def test_a_lone_surrogate_is_a_replacement_character(tiny: GPT) -> None:
    assert tiny.tokenizer.encode("a\ud800b") == tiny.tokenizer.encode("a\ufffdb")


def test_special_tokens_in_a_text_are_plain_text(tiny: GPT) -> None:
    ids = tiny.tokenizer.encode("a<|endoftext|>")
    assert 261 not in ids
    assert tiny.tokenizer.decode(ids) == "a<|endoftext|>"


def test_ids_of_a_padded_vocabulary_are_replacement_characters(tiny: GPT) -> None:
    assert tiny.tokenizer.decode([65, 262, 66, 269]) == "A\ufffdB\ufffd"


@pytest.mark.parametrize("token_id", [-1, 270, 10**30])
def test_ids_outside_the_vocabulary_are_refused(tiny: GPT, token_id: int) -> None:
    with pytest.raises(InputError, match=r"outside the vocabulary 0\.\.269"):
        tiny.tokenizer.decode([token_id])


def test_ranks_come_back() -> None:
    assert parse_ranks(lines(RANKS), "ranks") == RANKS


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "lacks one of the 256"),
        (lines(RANKS[1:]), "lacks one of the 256"),
        (lines([*RANKS, b"he"]), "repeats a token"),
        (lines([*RANKS, b""]), "line 262"),
        (lines(RANKS) + b"YWI= 7\n", "line 262 .* not rank 261"),
        (lines(RANKS) + b"YWI= -1\n", "line 262"),
        (lines(RANKS) + b"YWI= 0261\n", "line 262"),
        (lines(RANKS) + b"YWI=\n", "line 262 is not 'base64 rank'"),
        (lines(RANKS) + b"\n", "line 262 is not 'base64 rank'"),
        (lines(RANKS) + b"Y*I= 261\n", "line 262 is not 'base64 rank'"),
        (lines(RANKS) + b"YWI= 261 x\n", "line 262 is not 'base64 rank'"),
        (b"<html>not found</html>", "line 1 is not 'base64 rank'"),
    ],
)
def test_a_broken_vocabulary_is_refused_before_tiktoken_panics(data: bytes, said: str) -> None:
    with pytest.raises(BundleError, match=said):
        parse_ranks(data, "ranks")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pattern": "("}, "not a regular expression"),
        ({"special_tokens": {"<|endoftext|>": 270}}, "do not fit 270 ids"),
        ({"special_tokens": {"<|endoftext|>": 5}}, "do not fit 270 ids"),
        ({"special_tokens": {"<a>": 261, "<b>": 261}}, "share an id"),
        ({"eos_token_id": 270}, "eos_token_id 270"),
    ],
)
def test_a_tokenizer_that_does_not_fit_the_model_is_refused(edit: Edit, change: dict[str, Any], said: str) -> None:
    with pytest.raises(BundleError, match=said):
        load(edit(lambda manifest: manifest["tokenizer"].update(change)))


def test_more_tokens_than_the_model_has_ids_are_refused(bundle: Path, edit: Edit) -> None:
    (bundle / "tokenizer.tiktoken").write_bytes(lines(RANKS + [b"x%d" % i for i in range(10)]))
    with pytest.raises(BundleError, match="do not fit 270 ids"):
        load(edit(lambda manifest: None))


def test_a_bundle_without_an_end_of_text_token_never_ends_by_itself(edit: Edit) -> None:
    with load(edit(lambda manifest: manifest["tokenizer"].update(special_tokens={}, eos_token_id=None))) as gpt:
        stream = gpt.stream("hello", max_new_tokens=72)
        "".join(stream)
        assert stream.finish_reason == "length"
        assert gpt.tokenizer.decode([261]) == "\ufffd"
