"""Vocabularies against tiktoken and the tokenizers library, on the real GPT-2 files."""

import json
import shutil
from pathlib import Path

import pytest
import tiktoken
from gptedge_export import ExportError, Vocabulary, load_vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer


@pytest.fixture(scope="session")
def hugging_face(gpt2: Vocabulary) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(gpt2.to_hugging_face()))


def encoding(vocabulary: Vocabulary) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "test",
        pat_str=vocabulary.pattern,
        mergeable_ranks={token: rank for rank, token in enumerate(vocabulary.ranks)},
        special_tokens=dict(vocabulary.special_tokens),
    )


def test_gpt2_has_the_books_ids(gpt2: Vocabulary) -> None:
    assert gpt2.size == 50257
    assert gpt2.eos_token_id == 50256
    assert encoding(gpt2).encode_ordinary("Hello, I am") == [15496, 11, 314, 716]


@settings(deadline=None)
@given(text=st.text())
def test_tokenizer_json_encodes_as_tiktoken_does(text: str, gpt2: Vocabulary, hugging_face: Tokenizer) -> None:
    assert hugging_face.encode(text, add_special_tokens=False).ids == encoding(gpt2).encode_ordinary(text)


def test_ranks_file_and_tokenizer_json_read_back_equal(gpt2: Vocabulary, tmp_path: Path) -> None:
    (tmp_path / "ranks.tiktoken").write_bytes(gpt2.to_tiktoken())
    (tmp_path / "tokenizer.json").write_text(json.dumps(gpt2.to_hugging_face()))
    assert load_vocabulary(str(tmp_path / "ranks.tiktoken")) == gpt2
    assert load_vocabulary(str(tmp_path / "tokenizer.json")) == gpt2


def test_openais_names_of_the_files_are_known(gpt2: Vocabulary, gpt2_folder: Path, tmp_path: Path) -> None:
    shutil.copy(gpt2_folder / "vocab.json", tmp_path / "encoder.json")
    shutil.copy(gpt2_folder / "merges.txt", tmp_path / "vocab.bpe")
    assert load_vocabulary(str(tmp_path)) == gpt2


def test_bytes_is_one_token_a_byte() -> None:
    assert encoding(load_vocabulary("bytes")).encode_ordinary("é") == [0xC3, 0xA9]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("", "single bytes are no tokens"),
        ("IQ== 0\nIQ== 1\n", "a token occurs twice"),
        ("IQ== 1\n", "line 1 is not a token"),
        ("IQ==\n", "line 1 is not a token"),
        ("*** 0\n", "line 1 is not a token"),
        ("<html>\n", "line 1 is not a token"),
    ],
)
def test_a_broken_ranks_file_is_refused(content: str, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "ranks.tiktoken"
    path.write_text(content)
    with pytest.raises(ExportError, match=cause):
        load_vocabulary(str(path))


@pytest.mark.parametrize("content", ["[]", "{", '{"model": {"type": "WordPiece"}}', '{"model": {"type": "BPE"}}'])
def test_a_foreign_tokenizer_json_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ExportError, match=r"tokenizer\.json"):
        load_vocabulary(str(path))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ExportError, match="no tokenizer 'gpt9'"):
        load_vocabulary("gpt9")
